//! Questions as clients ask them, and the answers' bytes.

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType, rdata::SOA},
};

use super::zone::Answer;

/// How long clients may keep an answer, in seconds (net/dns/resolver/tsdns.go). Asking again costs
/// nothing, and containers come and go.
const TTL: u32 = 5;
/// How long clients may keep that there is no such name, in seconds (there, too).
const NEGATIVE_TTL: u32 = 10;
/// The longest answer by UDP: what a packet of 1280 bytes holds behind IPv6 and UDP headers.
const MAX_UDP: u16 = 1232;
/// The longest answer by UDP to clients without EDNS (RFC 1035, section 2.3.4).
const MIN_UDP: u16 = 512;
/// Bytes of a DNS header.
const HEADER: usize = 12;
/// TC, in the third byte of the header.
const TRUNCATED: u8 = 0x02;

/// One question of a client.
#[derive(Clone, Debug)]
pub struct Request {
    bytes: Vec<u8>,
    /// Where the question section ends.
    question_end: usize,
    query: Query,
    id: u16,
    recursion_desired: bool,
    /// How long an answer by UDP the client takes; `None`: it speaks no EDNS.
    edns: Option<u16>,
}

/// Why there is no question to answer.
#[derive(Debug, PartialEq)]
pub enum Unanswerable {
    /// Say so in these bytes.
    Reply(Vec<u8>),
    /// Keep quiet: it is no query at all.
    Ignore,
}

impl Request {
    /// Reads a query with one question.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, Unanswerable> {
        let Some(header) = bytes.first_chunk::<HEADER>() else {
            return Err(Unanswerable::Ignore);
        };
        if header[2] & 0x80 != 0 {
            return Err(Unanswerable::Ignore);
        }
        let id = u16::from_be_bytes([header[0], header[1]]);
        let op_code = OpCode::from_u8(header[2] >> 3 & 0x0f);
        let refuse = |code| match Message::error_msg(id, op_code, code).to_vec() {
            Ok(reply) => Unanswerable::Reply(reply),
            Err(_) => Unanswerable::Ignore,
        };
        if op_code != OpCode::Query {
            return Err(refuse(ResponseCode::NotImp));
        }
        let (Ok(message), Some(question_end)) = (Message::from_vec(&bytes), question_end(&bytes))
        else {
            return Err(refuse(ResponseCode::FormErr));
        };
        let [query] = &message.queries[..] else {
            return Err(refuse(ResponseCode::FormErr));
        };
        Ok(Self {
            question_end,
            query: query.clone(),
            id,
            recursion_desired: message.metadata.recursion_desired,
            edns: message.edns.as_ref().map(Edns::max_payload),
            bytes,
        })
    }

    /// The name asked for.
    pub fn name(&self) -> &Name {
        &self.query.name
    }

    /// The type of record asked for; `None` in classes other than the Internet's.
    pub fn kind(&self) -> Option<RecordType> {
        (self.query.query_class == DNSClass::IN).then_some(self.query.query_type)
    }

    /// How long an answer to it another server may send by UDP.
    pub fn udp_room(&self) -> usize {
        self.edns.unwrap_or(MIN_UDP).max(MIN_UDP).into()
    }

    /// The query as it came, but with another id.
    pub fn with_id(&self, id: u16) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[..2].copy_from_slice(&id.to_be_bytes());
        bytes
    }

    /// Whether these bytes are an answer to [`Self::with_id`].
    pub fn is_answered_by(&self, id: u16, bytes: &[u8]) -> bool {
        let Some(header) = bytes.first_chunk::<HEADER>() else {
            return false;
        };
        if header[..2] != id.to_be_bytes() || header[2] & 0x80 == 0 {
            return false;
        }
        let (questions, code) = (u16::from_be_bytes([header[4], header[5]]), header[3] & 0x0f);
        if questions == 0 {
            // Servers that fail may leave the question out.
            return code != 0;
        }
        let asked = &self.bytes[HEADER..self.question_end];
        let (name, rest) = asked.split_at(asked.len() - 4);
        bytes.get(HEADER..self.question_end).is_some_and(|echo| {
            let (echoed, echoed_rest) = echo.split_at(name.len());
            questions == 1 && echoed.eq_ignore_ascii_case(name) && echoed_rest == rest
        })
    }

    /// Another server's answer with the client's id.
    pub fn pass_on(&self, mut answer: Vec<u8>) -> Vec<u8> {
        if let Some(id) = answer.first_chunk_mut() {
            *id = self.id.to_be_bytes();
        }
        answer
    }

    /// The answer from what a zone knows; `None` if somebody else is to be asked.
    pub fn answer(&self, answer: Answer) -> Option<Vec<u8>> {
        Some(match answer {
            Answer::Records(records) => self.reply(ResponseCode::NoError, records, None),
            Answer::NoData { zone } => self.reply(ResponseCode::NoError, Vec::new(), Some(zone)),
            Answer::NxDomain { zone } => self.reply(ResponseCode::NXDomain, Vec::new(), Some(zone)),
            Answer::Forward(_) | Answer::NotMine => return None,
        })
    }

    /// The answer when nobody could be asked.
    pub fn fail(&self) -> Vec<u8> {
        self.reply(ResponseCode::ServFail, Vec::new(), None)
    }

    /// The answer cut to what the client takes by UDP: nothing but the question if it is longer,
    /// so that the client asks again by TCP.
    pub fn fit_udp(&self, answer: Vec<u8>) -> Vec<u8> {
        let limit = self.edns.unwrap_or(MIN_UDP).clamp(MIN_UDP, MAX_UDP);
        let Some(header) = answer
            .first_chunk::<HEADER>()
            .filter(|_| answer.len() > limit.into())
        else {
            return answer;
        };
        let mut header = *header;
        header[2] |= TRUNCATED;
        header[4..].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
        let mut short = Vec::with_capacity(self.question_end + 11);
        short.extend(header);
        short.extend(&self.bytes[HEADER..self.question_end]);
        if self.edns.is_some() {
            short[11] = 1;
            // An empty OPT record (RFC 6891, section 6.1.2).
            short.extend([0, 0, 41]);
            short.extend(MAX_UDP.to_be_bytes());
            short.extend([0; 6]);
        }
        short
    }

    fn reply(&self, code: ResponseCode, records: Vec<RData>, soa: Option<Name>) -> Vec<u8> {
        let mut message = Message::new(self.id, MessageType::Response, OpCode::Query);
        message.metadata.response_code = code;
        message.metadata.authoritative = code != ResponseCode::ServFail;
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.recursion_available = true;
        message.add_query(self.query.clone());
        let record = |data| Record::from_rdata(self.query.name.clone(), TTL, data);
        message.add_answers(records.into_iter().map(record));
        if let Some(zone) = soa {
            // Only its TTL says anything (RFC 2308); there is no second server to copy the zone.
            let ttl = NEGATIVE_TTL as i32;
            let soa = SOA::new(zone.clone(), zone.clone(), 1, ttl, ttl, ttl, NEGATIVE_TTL);
            message.add_authority(Record::from_rdata(zone, NEGATIVE_TTL, RData::SOA(soa)));
        }
        if self.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(MAX_UDP);
            message.set_edns(edns);
        }
        message.to_vec().unwrap_or_else(|error| {
            tracing::warn!(name = %self.query.name, %error, "a DNS answer cannot be written");
            let mut header = vec![0x84, ResponseCode::ServFail.low(), 0, 0, 0, 0, 0, 0, 0, 0];
            header.splice(0..0, self.id.to_be_bytes());
            header
        })
    }
}

/// Whether the answer says that it was cut.
pub fn is_truncated(answer: &[u8]) -> bool {
    answer.get(2).is_some_and(|flags| flags & TRUNCATED != 0)
}

/// Whether the server could not or would not answer, so that another one may be asked.
pub fn is_failure(answer: &[u8]) -> bool {
    answer.get(3).is_some_and(|flags| {
        let code = ResponseCode::from_low(flags & 0x0f);
        matches!(
            code,
            ResponseCode::ServFail | ResponseCode::Refused | ResponseCode::NotImp
        )
    })
}

/// Where the only question ends. `None` if there is another number of them, or if it is cut short
/// or compressed, which the first name in a message cannot be.
fn question_end(bytes: &[u8]) -> Option<usize> {
    if bytes.get(4..6)? != [0, 1] {
        return None;
    }
    let mut at = HEADER;
    loop {
        match usize::from(*bytes.get(at)?) {
            0 => break,
            length @ 1..=63 => at += 1 + length,
            _ => return None,
        }
    }
    let end = at + 1 + 4;
    (end <= bytes.len()).then_some(end)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{net::Ipv4Addr, str::FromStr};

    use hickory_proto::rr::rdata::A;
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// A query as a client writes it.
    pub(crate) fn query(id: u16, name: &str, kind: RecordType, edns: Option<u16>) -> Vec<u8> {
        let mut message = Message::query();
        message.metadata.id = id;
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_str(name).unwrap(), kind));
        if let Some(size) = edns {
            let mut edns = Edns::new();
            edns.set_max_payload(size);
            message.set_edns(edns);
        }
        message.to_vec().unwrap()
    }

    fn request(edns: Option<u16>) -> Request {
        Request::parse(query(7, "Web.t.net.", RecordType::A, edns)).unwrap()
    }

    fn addresses(count: u8) -> Answer {
        Answer::Records(
            (0..count)
                .map(|n| RData::A(A(Ipv4Addr::new(100, 64, 0, n))))
                .collect(),
        )
    }

    #[test]
    fn answers() {
        for edns in [None, Some(1232)] {
            let request = request(edns);
            let reply = Message::from_vec(&request.answer(addresses(2)).unwrap()).unwrap();
            assert_eq!((reply.id, reply.message_type), (7, MessageType::Response));
            assert!(reply.authoritative && reply.recursion_available && reply.recursion_desired);
            assert_eq!(reply.response_code, ResponseCode::NoError);
            assert_eq!(reply.answers.len(), 2);
            assert!(reply.answers[0].name.eq_case(request.name()));
            assert_eq!(reply.edns.is_some(), edns.is_some());

            let zone = Name::from_str("t.net.").unwrap();
            let none = request
                .answer(Answer::NxDomain { zone: zone.clone() })
                .unwrap();
            let none = Message::from_vec(&none).unwrap();
            assert_eq!(none.response_code, ResponseCode::NXDomain);
            assert_eq!(
                (&none.authorities[0].name, none.authorities[0].ttl),
                (&zone, NEGATIVE_TTL)
            );
            let fail = Message::from_vec(&request.fail()).unwrap();
            assert_eq!(fail.response_code, ResponseCode::ServFail);
            assert_eq!(request.answer(Answer::NotMine), None);
        }
    }

    #[test]
    fn long_answers_are_cut_for_udp() {
        for (edns, count, cut) in [
            (None, 20, false),
            (None, 50, true),
            (Some(100), 20, false),
            (Some(1232), 50, false),
            (Some(1232), 100, true),
            (Some(65535), 100, true),
        ] {
            let request = request(edns);
            let answer = request.answer(addresses(count)).unwrap();
            let sent = request.fit_udp(answer.clone());
            let read = Message::from_vec(&sent).unwrap();
            assert_eq!(read.truncation, cut, "{edns:?} {count}");
            assert_eq!(is_truncated(&sent), cut);
            assert_eq!(read.edns.is_some(), edns.is_some());
            assert_eq!(read.queries.len(), 1);
            if !cut {
                assert_eq!(sent, answer);
            }
        }
    }

    #[test]
    fn only_the_answer_to_the_question_counts() {
        let request = request(None);
        let answer = |id, name: &str, kind| {
            let mut message = Message::from_vec(&query(id, name, kind, None)).unwrap();
            message.metadata.message_type = MessageType::Response;
            message.to_vec().unwrap()
        };
        assert!(request.is_answered_by(9, &answer(9, "web.T.net.", RecordType::A)));
        assert!(!request.is_answered_by(9, &answer(8, "web.t.net.", RecordType::A)));
        assert!(!request.is_answered_by(9, &answer(9, "wet.t.net.", RecordType::A)));
        assert!(!request.is_answered_by(9, &answer(9, "web.t.net.", RecordType::AAAA)));
        assert!(
            !request.is_answered_by(9, &request.with_id(9)),
            "a question"
        );
        let failed = Message::error_msg(9, OpCode::Query, ResponseCode::Refused)
            .to_vec()
            .unwrap();
        assert!(request.is_answered_by(9, &failed) && is_failure(&failed));
        let passed = request.pass_on(answer(9, "web.t.net.", RecordType::A));
        assert_eq!(passed[..2], [0, 7]);
    }

    #[test]
    fn what_is_no_question() {
        let code = |bytes: Vec<u8>| match Request::parse(bytes) {
            Err(Unanswerable::Reply(reply)) => {
                Some(Message::from_vec(&reply).unwrap().response_code)
            }
            Err(Unanswerable::Ignore) => None,
            Ok(request) => panic!("{request:?}"),
        };
        let good = query(7, "web.", RecordType::A, None);
        assert_eq!(code(good[..11].to_vec()), None);
        assert_eq!(
            code(good[..good.len() - 1].to_vec()),
            Some(ResponseCode::FormErr)
        );
        assert_eq!(code(request(None).fail()), None, "an answer");
        let mut notify = good.clone();
        notify[2] |= 4 << 3;
        assert_eq!(code(notify), Some(ResponseCode::NotImp));
        let mut none = good.clone();
        none[5] = 0;
        assert_eq!(code(none), Some(ResponseCode::FormErr));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in vec(any::<u8>(), 0..100), answer in vec(any::<u8>(), 0..100)) {
            let _ = Request::parse(bytes);
            let request = request(None);
            request.is_answered_by(7, &answer);
            let _ = (is_truncated(&answer), is_failure(&answer));
            request.fit_udp(request.pass_on(answer));
        }

        #[test]
        fn damaged_queries_do_not_panic(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in 0usize..40) {
            let mut bytes = query(7, "web.t.net.", RecordType::A, Some(1232));
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes.truncate(bytes.len().saturating_sub(cut));
            if let Ok(request) = Request::parse(bytes) {
                request.fit_udp(request.fail());
                request.answer(addresses(1));
            }
        }
    }
}
