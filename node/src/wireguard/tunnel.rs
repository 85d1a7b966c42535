//! One peer: its sessions, and when they are to be renewed.

use std::{
    collections::VecDeque,
    ops::Range,
    time::{Duration, Instant},
};

use tailnode_wire::keys::NodePublicKey;
use tracing::{debug, trace};

use super::{
    INITIATION, Identity, Initiation, RESPONSE,
    handshake::{Macs, Sent, Timestamp},
    session::Session,
};

// The paper's constants (section 6.1).
const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// Repetitions wait a little longer than the last, up to this much, lest two peers go in step.
const JITTER: Duration = Duration::from_millis(333);
/// After a silence that long, a peer that does not answer at once has probably lost the session:
/// WireGuard would wait all of it anew.
const SILENCE: Duration = KEEPALIVE_TIMEOUT.saturating_add(REKEY_TIMEOUT);
const AT_ONCE: Duration = Duration::from_secs(1);

/// Packets that wait for a handshake's end.
const WAITING: usize = 256;
/// Handshakes that may still be answered: the repetitions of one.
const SENT: usize = 4;

/// A peer that is in use.
pub struct Tunnel {
    peer: NodePublicKey,
    /// The first of the 256 indices that name us in what the peer sends.
    index: u32,
    /// How many of them were used.
    used: u8,
    made: Instant,
    macs: Macs,
    /// When the peer's latest handshake was begun, by its clock.
    heard: Timestamp,
    /// What to seal with, and what the peer may still seal with.
    current: Option<Box<Session>>,
    previous: Option<Box<Session>>,
    /// What the peer asked for and has not used yet, the latest at the end. Of a handshake that it
    /// repeated, it may use the first answer that comes.
    next: VecDeque<Session>,
    /// Handshakes of ours, the latest at the end.
    sent: VecDeque<(u32, Sent)>,
    attempt: Option<Attempt>,
    waiting: VecDeque<Vec<u8>>,
    /// When a packet came that we have not answered with one; when one went that the peer has not.
    owed: Option<Instant>,
    unanswered: Option<Instant>,
    received: Option<Instant>,
    /// Whether packets went or came since the session began: what is not used is not renewed.
    has_sent: bool,
    has_received: bool,
}

/// A handshake of ours that is under way.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    since: Instant,
    repeat: Instant,
}

/// What time has made due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    Nothing,
    /// [`Tunnel::initiate`].
    Handshake,
    /// Seal an empty packet.
    Keepalive,
    /// The peer does not answer, or the tunnel is long out of use: drop it.
    Expired,
}

impl Tunnel {
    /// `index`: the peer's datagrams will name this one, or one of the 255 above.
    pub fn new(peer: NodePublicKey, index: u32, now: Instant) -> Self {
        Self {
            peer,
            index,
            used: 0,
            made: now,
            macs: Macs::new(&peer),
            heard: Timestamp::default(),
            current: None,
            previous: None,
            next: VecDeque::new(),
            sent: VecDeque::new(),
            attempt: None,
            waiting: VecDeque::new(),
            owed: None,
            unanswered: None,
            received: None,
            has_sent: false,
            has_received: false,
        }
    }

    /// Whether packets can be sealed now.
    pub fn is_ready(&self, now: Instant) -> bool {
        self.current.as_ref().is_some_and(|session| {
            now < session.since + REJECT_AFTER_TIME && session.sent() < REJECT_AFTER_MESSAGES
        })
    }

    /// How long ago the youngest session began.
    pub fn age(&self, now: Instant) -> Option<Duration> {
        let sessions = self.current.as_deref().into_iter().chain(&self.next);
        let ages = sessions.map(|session| now.saturating_duration_since(session.since));
        ages.min()
    }

    /// Makes datagrams of packets, as [`Session::seal`] does. `false`: it is not ready, and what is
    /// there is in the clear.
    #[must_use]
    pub fn seal(&mut self, bytes: &mut [u8], datagrams: &[Range<usize>], now: Instant) -> bool {
        let is_ready = self.is_ready(now);
        let Some(session) = self.current.as_mut().filter(|_| is_ready) else {
            return false;
        };
        session.seal(bytes, datagrams);
        self.owed = None;
        if datagrams.iter().any(|range| range.len() > super::OVERHEAD) {
            self.has_sent = true;
            self.unanswered.get_or_insert(now);
        }
        true
    }

    /// Keeps a packet until [`Tunnel::take_waiting`].
    pub fn wait(&mut self, packet: &[u8]) {
        if self.waiting.len() < WAITING {
            self.waiting.push_back(packet.to_vec());
        }
    }

    /// What waited for a handshake's end.
    pub fn take_waiting(&mut self) -> VecDeque<Vec<u8>> {
        std::mem::take(&mut self.waiting)
    }

    /// Opens a train of datagrams for the session `index`, as [`Session::open`] does. `take` is told of
    /// packets, not of keepalives. `false`: there is no such session.
    pub fn open(
        &mut self,
        index: u32,
        (train, size): (&[u8], usize),
        now: Instant,
        plain: &mut [u8],
        mut take: impl FnMut(Range<usize>),
    ) -> bool {
        let established = [&mut self.current, &mut self.previous];
        let established = established.into_iter().flatten().map(Box::as_mut);
        let known = established
            .chain(&mut self.next)
            .find(|session| session.local == index && now < session.since + REJECT_AFTER_TIME);
        let Some(session) = known else {
            trace!(index, "no such session");
            return false;
        };
        let (mut any, mut data) = (false, false);
        session.open(train, size, plain, |range| {
            any = true;
            if !range.is_empty() {
                data = true;
                take(range);
            }
        });
        if !any {
            return true;
        }
        if let Some(at) = self.next.iter().position(|next| next.local == index) {
            let next = self.next.drain(..=at).next_back().map(Box::new);
            self.previous = std::mem::replace(&mut self.current, next);
            self.begin_session();
        }
        self.received = Some(now);
        self.unanswered = None;
        if data {
            self.has_received = true;
            self.owed.get_or_insert(now);
        }
        true
    }

    /// Begins a handshake, or repeats the one that is under way.
    pub fn initiate(&mut self, identity: &mut Identity, now: Instant) -> [u8; INITIATION] {
        let index = self.next_index();
        let (sent, message) = identity.initiate(&self.peer, index, &mut self.macs, now);
        if self.sent.len() == SENT {
            self.sent.pop_front();
        }
        self.sent.push_back((index, sent));
        let repeat = now + REKEY_TIMEOUT + JITTER.mul_f32(rand::random());
        match &mut self.attempt {
            Some(attempt) => attempt.repeat = repeat,
            None => self.attempt = Some(Attempt { since: now, repeat }),
        }
        message
    }

    /// Whether a handshake of ours is under way.
    pub fn is_initiating(&self) -> bool {
        self.attempt.is_some()
    }

    /// Answers a handshake of the peer's; `None`: it is a repetition.
    pub fn respond(
        &mut self,
        initiation: Initiation,
        identity: &mut Identity,
        now: Instant,
    ) -> Option<[u8; RESPONSE]> {
        if initiation.stamp <= self.heard {
            debug!(peer = %self.peer, "a handshake from before the last is not answered");
            return None;
        }
        self.heard = initiation.stamp;
        let (index, remote) = (self.next_index(), initiation.sender);
        let (keys, message) = identity.respond(initiation, index, &mut self.macs, now);
        if self.next.len() == SENT {
            self.next.pop_front();
        }
        self.next
            .push_back(Session::new((index, remote), false, keys, now));
        self.received = Some(now);
        self.unanswered = None;
        Some(message)
    }

    /// Takes the response to a handshake of ours. Returns whether a session began: then something is
    /// to be sealed at once, if only an empty packet, by which the peer knows.
    pub fn finish(
        &mut self,
        identity: &Identity,
        index: u32,
        response: &[u8],
        now: Instant,
    ) -> bool {
        let Some(at) = self.sent.iter().position(|(sent, _)| *sent == index) else {
            return false;
        };
        let Some((_, sent)) = self.sent.remove(at) else {
            return false;
        };
        let keys = match identity.finish(sent, response) {
            Ok(keys) => keys,
            Err(sent) => {
                self.sent.insert(at, (index, sent));
                return false;
            }
        };
        let Some(remote) = response[4..].first_chunk() else {
            return false;
        };
        let remote = u32::from_le_bytes(*remote);
        // What was sent before it is worth nothing any more.
        self.sent.drain(..at);
        let session = Session::new((index, remote), true, keys, now);
        self.previous = self.current.replace(Box::new(session));
        self.begin_session();
        self.received = Some(now);
        self.unanswered = None;
        true
    }

    /// Takes a cookie, for the handshake's repetition.
    pub fn take_cookie(&mut self, reply: &[u8], now: Instant) {
        self.macs.take_cookie(reply, now);
    }

    /// Does what time has made due, and says what is to be sent.
    pub fn tick(&mut self, now: Instant) -> Due {
        let is_over = |session: &mut Box<Session>| now >= session.since + REJECT_AFTER_TIME;
        let since = self.current.as_ref().map_or(self.made, |s| s.since);
        let since = self.next.back().map_or(since, |next| since.max(next.since));
        let silent = self.received.map_or(since, |received| received.max(since));
        if self.attempt.is_none() && now >= silent + 3 * REJECT_AFTER_TIME {
            return Due::Expired;
        }
        self.next
            .retain(|next| now < next.since + REJECT_AFTER_TIME);
        self.previous.take_if(is_over);
        if let Some(Attempt { since, repeat }) = self.attempt {
            return if now >= since + REKEY_ATTEMPT_TIME {
                debug!(peer = %self.peer, "it does not answer handshakes");
                Due::Expired
            } else if now >= repeat {
                Due::Handshake
            } else {
                Due::Nothing
            };
        }
        if let Some(session) = &self.current {
            let age = now.saturating_duration_since(session.since);
            if age >= REKEY_TIMEOUT {
                // No answer is on its way any more, and these are secrets.
                self.sent.clear();
            }
            let renew = session.is_initiator
                && age < REJECT_AFTER_TIME
                && (self.has_sent
                    && (age >= REKEY_AFTER_TIME || session.sent() >= REKEY_AFTER_MESSAGES)
                    || self.has_received
                        && age >= REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT);
            if renew {
                return Due::Handshake;
            }
            self.current.take_if(is_over);
        }
        let waited = |since: Option<Instant>, long| since.is_some_and(|since| now >= since + long);
        let was_silent = |at: Instant| self.received.is_none_or(|last| at >= last + SILENCE);
        if waited(self.unanswered, SILENCE)
            || waited(self.unanswered.filter(|&at| was_silent(at)), AT_ONCE)
        {
            self.unanswered = None;
            return Due::Handshake;
        }
        if waited(self.owed, KEEPALIVE_TIMEOUT) {
            self.owed = None;
            if self.is_ready(now) {
                return Due::Keepalive;
            }
        }
        Due::Nothing
    }

    fn begin_session(&mut self) {
        debug!(peer = %self.peer, "a new session");
        self.attempt = None;
        self.has_sent = false;
        self.has_received = false;
    }

    fn next_index(&mut self) -> u32 {
        self.used = self.used.wrapping_add(1);
        self.index + u32::from(self.used)
    }
}

#[cfg(test)]
mod tests {
    use boringtun::noise::{Tunn, TunnResult, rate_limiter::RateLimiter};
    use tailnode_wire::keys::{ExportableKey as _, NodeKeyPair};

    use super::*;
    use crate::wireguard::{COOKIE, HEADER, Heard, Kind, OVERHEAD};

    /// One end of a tunnel, with all that its router does for it.
    struct End {
        identity: Identity,
        tunnel: Tunnel,
        got: Vec<Vec<u8>>,
    }

    impl End {
        fn pair(now: Instant) -> [Self; 2] {
            let keys = [NodeKeyPair::random(), NodeKeyPair::random()];
            [0, 1].map(|me| Self {
                identity: Identity::new(keys[me].clone()),
                tunnel: Tunnel::new(keys[1 - me].public, (me as u32 + 1) << 8, now),
                got: Vec::new(),
            })
        }

        fn seal(&mut self, packet: &[u8], now: Instant) -> Vec<u8> {
            let mut bytes = vec![0; OVERHEAD + packet.len()];
            bytes[HEADER..HEADER + packet.len()].copy_from_slice(packet);
            let datagram = 0..bytes.len();
            assert!(self.tunnel.seal(&mut bytes, &[datagram], now));
            bytes
        }

        /// Sends a packet, or what must come before it.
        fn send(&mut self, packet: &[u8], now: Instant) -> Vec<Vec<u8>> {
            if self.tunnel.is_ready(now) {
                return vec![self.seal(packet, now)];
            }
            self.tunnel.wait(packet);
            match self.tunnel.is_initiating() {
                true => Vec::new(),
                false => vec![self.tunnel.initiate(&mut self.identity, now).to_vec()],
            }
        }

        fn receive(&mut self, datagram: &[u8], now: Instant) -> Vec<Vec<u8>> {
            match Kind::of(datagram).unwrap() {
                Kind::Data(index) => {
                    let mut plain = vec![0; datagram.len()];
                    let mut got = Vec::new();
                    self.tunnel.open(
                        index,
                        (datagram, datagram.len()),
                        now,
                        &mut plain,
                        |range| {
                            got.push(range);
                        },
                    );
                    self.got
                        .extend(got.into_iter().map(|range| plain[range].to_vec()));
                    self.flush(now)
                }
                Kind::Cookie(_) => {
                    self.tunnel.take_cookie(datagram, now);
                    Vec::new()
                }
                kind => match (self.identity.hear(datagram, None, now), kind) {
                    (Heard::Initiation(initiation), _) => self
                        .tunnel
                        .respond(*initiation, &mut self.identity, now)
                        .into_iter()
                        .map(|response| response.to_vec())
                        .collect(),
                    (Heard::Response, Kind::Response(index)) => {
                        if !self.tunnel.finish(&self.identity, index, datagram, now) {
                            return Vec::new();
                        }
                        let mut sent = vec![self.seal(&[], now)];
                        sent.extend(self.flush(now));
                        sent
                    }
                    _ => Vec::new(),
                },
            }
        }

        fn flush(&mut self, now: Instant) -> Vec<Vec<u8>> {
            if !self.tunnel.is_ready(now) {
                return Vec::new();
            }
            let waiting = self.tunnel.take_waiting();
            waiting
                .iter()
                .map(|packet| self.seal(packet, now))
                .collect()
        }

        fn tick(&mut self, now: Instant) -> (Due, Vec<Vec<u8>>) {
            let due = self.tunnel.tick(now);
            let sent = match due {
                Due::Nothing | Due::Expired => Vec::new(),
                Due::Handshake => vec![self.tunnel.initiate(&mut self.identity, now).to_vec()],
                Due::Keepalive => vec![self.seal(&[], now)],
            };
            (due, sent)
        }
    }

    /// Carries what one sent, and what that leads to.
    fn carry(ends: &mut [End; 2], from: usize, sent: Vec<Vec<u8>>, now: Instant) {
        let mut on_the_way: VecDeque<_> = sent.into_iter().map(|bytes| (from, bytes)).collect();
        while let Some((from, bytes)) = on_the_way.pop_front() {
            let to = 1 - from;
            let answers = ends[to].receive(&bytes, now);
            on_the_way.extend(answers.into_iter().map(|bytes| (to, bytes)));
        }
    }

    fn say(ends: &mut [End; 2], from: usize, packet: &[u8], now: Instant) {
        let sent = ends[from].send(packet, now);
        carry(ends, from, sent, now);
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn what_waits_for_the_handshake_arrives_in_order() {
        let now = Instant::now();
        let mut ends = End::pair(now);
        let mut first = ends[0].send(b"one", now);
        first.extend(ends[0].send(b"two", now));
        assert_eq!(first.len(), 1, "one handshake for both");
        carry(&mut ends, 0, first, now);
        say(&mut ends, 1, b"three", now);
        assert_eq!(ends[1].got, [b"one", b"two"]);
        assert_eq!(ends[0].got, [b"three"]);
        assert_eq!(ends[0].tunnel.age(now + seconds(3)), Some(seconds(3)));
    }

    #[test]
    fn both_may_begin_at_once() {
        let now = Instant::now();
        let mut ends = End::pair(now);
        let sent = [0, 1].map(|at| ends[at].send(&[at as u8], now));
        let answers = [1, 0].map(|at| ends[at].receive(&sent[1 - at][0], now));
        let [from_one, from_zero] = answers;
        carry(&mut ends, 1, from_one, now);
        carry(&mut ends, 0, from_zero, now);
        for round in 2..6 {
            say(&mut ends, 0, &[round], now);
            say(&mut ends, 1, &[round], now);
        }
        assert_eq!(ends[0].got, [[1], [2], [3], [4], [5]]);
        assert_eq!(ends[1].got, [[0], [2], [3], [4], [5]]);
    }

    #[test]
    fn the_answer_to_an_earlier_repetition_counts() {
        let now = Instant::now();
        let mut ends = End::pair(now);
        let first = ends[0].send(b"hello", now);
        let again = ends[0].tunnel.initiate(&mut ends[0].identity, now).to_vec();
        carry(&mut ends, 0, first, now);
        assert!(ends[0].tunnel.is_ready(now));
        carry(&mut ends, 0, vec![again], now);
        say(&mut ends, 0, b"more", now);
        assert_eq!(ends[1].got, [&b"hello"[..], b"more"]);
    }

    #[test]
    fn the_first_answer_will_do_though_both_initiations_have_arrived() {
        let now = Instant::now();
        let mut ends = End::pair(now);
        let first = ends[0].send(b"hello", now).remove(0);
        let again = ends[0].tunnel.initiate(&mut ends[0].identity, now);
        let answers = [first, again.to_vec()].map(|message| ends[1].receive(&message, now));
        for answer in answers {
            carry(&mut ends, 1, answer, now);
        }
        say(&mut ends, 0, b"more", now);
        say(&mut ends, 1, b"and back", now);
        assert_eq!(ends[1].got, [&b"hello"[..], b"more"]);
        assert_eq!(ends[0].got, [b"and back"]);
    }

    #[test]
    fn a_repeated_initiation_changes_nothing() {
        let now = Instant::now();
        let mut ends = End::pair(now);
        let recorded = ends[0].send(b"hello", now);
        carry(&mut ends, 0, recorded.clone(), now);
        assert!(ends[1].receive(&recorded[0], now).is_empty(), "no answer");
        say(&mut ends, 1, b"still here", now);
        assert_eq!(ends[0].got, [b"still here"]);
    }

    #[test]
    fn who_began_renews_what_is_used_and_nobody_else_does() {
        let start = Instant::now();
        let mut ends = End::pair(start);
        say(&mut ends, 0, b"hello", start);
        let later = start + REKEY_AFTER_TIME;
        say(&mut ends, 1, b"and", later - Duration::from_millis(1));
        let before = ends[0].tick(later - Duration::from_millis(1)).0;
        assert_eq!(before, Due::Nothing);
        assert_eq!(ends[1].tick(later).0, Due::Nothing, "it did not begin");
        let (due, sent) = ends[0].tick(later);
        assert_eq!(due, Due::Handshake);
        carry(&mut ends, 0, sent, later);
        assert_eq!(ends[0].tunnel.age(later), Some(Duration::ZERO));
        // Without a packet in it the new session is let go.
        let over = later + REJECT_AFTER_TIME;
        assert_eq!(ends[0].tick(over).0, Due::Nothing);
        assert!(!ends[0].tunnel.is_ready(over));
        say(&mut ends, 0, b"again", over);
        assert_eq!(ends[1].got.last().unwrap(), b"again");
    }

    #[test]
    fn packets_under_the_old_keys_still_come_in_after_a_renewal() {
        let start = Instant::now();
        let mut ends = End::pair(start);
        say(&mut ends, 0, b"hello", start);
        let later = start + REKEY_AFTER_TIME;
        let late = ends[1].send(b"late", later);
        let (_, sent) = ends[0].tick(later);
        carry(&mut ends, 0, sent, later);
        carry(&mut ends, 1, late, later);
        assert_eq!(ends[0].got, [b"late"]);
    }

    #[test]
    fn what_came_is_answered_at_last() {
        let start = Instant::now();
        let mut ends = End::pair(start);
        say(&mut ends, 0, b"hello", start);
        assert_eq!(ends[1].tick(start + seconds(9)).0, Due::Nothing);
        let now = start + KEEPALIVE_TIMEOUT;
        let (due, sent) = ends[1].tick(now);
        assert_eq!(due, Due::Keepalive);
        carry(&mut ends, 1, sent, now);
        assert!(ends[0].got.is_empty(), "it carries nothing");
        assert_eq!(ends[1].tick(now + seconds(60)).0, Due::Nothing, "once");
        assert_eq!(ends[0].tick(now + seconds(20)).0, Due::Nothing, "heard");
    }

    #[test]
    fn a_peer_that_does_not_answer_is_called_again_and_given_up() {
        let start = Instant::now();
        let mut ends = End::pair(start);
        say(&mut ends, 0, b"hello", start);
        say(&mut ends, 1, b"hello", start);
        let lost = ends[0].send(b"lost", start + seconds(1));
        assert_eq!(lost.len(), 1);
        assert_eq!(ends[0].tick(start + seconds(15)).0, Due::Nothing);
        let begun = start + seconds(16);
        assert_eq!(ends[0].tick(begun).0, Due::Handshake);
        assert_eq!(ends[0].tick(begun + seconds(4)).0, Due::Nothing);
        assert_eq!(ends[0].tick(begun + seconds(6)).0, Due::Handshake);
        assert_eq!(ends[0].tick(begun + REKEY_ATTEMPT_TIME).0, Due::Expired);
    }

    #[test]
    fn after_a_silence_no_answer_is_noticed_soon() {
        let start = Instant::now();
        let mut ends = End::pair(start);
        say(&mut ends, 0, b"hello", start);
        say(&mut ends, 1, b"hello", start);
        let now = start + seconds(60);
        ends[0].send(b"anybody there?", now);
        assert_eq!(ends[0].tick(now + seconds(1)).0, Due::Handshake);
    }

    #[test]
    fn a_tunnel_out_of_use_expires() {
        let start = Instant::now();
        let mut ends = End::pair(start);
        say(&mut ends, 0, b"hello", start);
        let end = start + 3 * REJECT_AFTER_TIME;
        assert_ne!(ends[1].tick(end - seconds(1)).0, Due::Expired);
        assert_eq!(ends[1].tick(end).0, Due::Expired);
    }

    #[test]
    fn under_load_a_caller_must_show_where_it_is() {
        let now = Instant::now();
        let [mut caller, mut called] = End::pair(now);
        let from = Some("192.0.2.1".parse().unwrap());
        let elsewhere = Some("192.0.2.2".parse().unwrap());
        let mut message = caller.send(b"hello", now).remove(0);
        let mut cookie: Option<[u8; COOKIE]> = None;
        for _ in 0..1000 {
            if let Heard::Cookie(reply) = called.identity.hear(&message, from, now) {
                cookie = Some(reply);
                break;
            }
        }
        assert!(
            matches!(called.identity.hear(&message, None, now), Heard::Nothing),
            "a relay cannot show an address"
        );
        caller.receive(&cookie.expect("it asks at last"), now);
        message = caller.tunnel.initiate(&mut caller.identity, now).to_vec();
        let heard = called.identity.hear(&message, elsewhere, now);
        assert!(matches!(heard, Heard::Cookie(_)), "it is another's");
        let Heard::Initiation(initiation) = called.identity.hear(&message, from, now) else {
            panic!("the cookie does not count");
        };
        let response = called
            .tunnel
            .respond(*initiation, &mut called.identity, now)
            .unwrap();
        carry(&mut [caller, called], 1, vec![response.to_vec()], now);
    }

    #[test]
    fn damaged_and_strange_messages_are_nothing() {
        let now = Instant::now();
        let [mut caller, mut called] = End::pair(now);
        let message = caller.send(b"hello", now).remove(0);
        for at in 0..message.len() - 16 {
            let mut damaged = message.clone();
            damaged[at] ^= 0x40;
            let heard = called.identity.hear(&damaged, None, now);
            assert!(matches!(heard, Heard::Nothing), "byte {at}");
        }
        let [mut stranger, _] = End::pair(now);
        let to_another = stranger.send(b"hello", now).remove(0);
        let heard = called.identity.hear(&to_another, None, now);
        assert!(matches!(heard, Heard::Nothing));
    }

    #[test]
    fn cookies_are_boringtuns_too() {
        let now = Instant::now();
        let keys = [NodeKeyPair::random(), NodeKeyPair::random()];
        let mut ours = End {
            identity: Identity::new(keys[0].clone()),
            tunnel: Tunnel::new(keys[1].public, 7 << 8, now),
            got: Vec::new(),
        };
        let from = "192.0.2.1".parse().unwrap();
        let private: boringtun::x25519::StaticSecret =
            (*keys[1].private.export().as_bytes()).into();
        let us = (*keys[0].public.export().as_bytes()).into();
        let busy = RateLimiter::new(&(&private).into(), 0);
        let mut theirs = Tunn::new(private, us, None, None, 9, Some(busy.into()));
        let mut buffer = [0; 256];
        let mut send = |ours: &mut End| {
            let message = ours.tunnel.initiate(&mut ours.identity, now);
            match theirs.decapsulate(Some(from), &message, &mut buffer) {
                TunnResult::WriteToNetwork(bytes) => bytes.to_vec(),
                other => panic!("{other:?}"),
            }
        };
        let cookie = send(&mut ours);
        assert_eq!(cookie.len(), COOKIE);
        ours.receive(&cookie, now);
        assert_eq!(send(&mut ours).len(), RESPONSE, "they take their cookie");

        // And the other way round.
        let mut send = |ours: &mut End| {
            let TunnResult::WriteToNetwork(message) =
                theirs.format_handshake_initiation(&mut buffer, true)
            else {
                panic!("they do not begin");
            };
            ours.identity.hear(message, Some(from), now)
        };
        let cookie = loop {
            if let Heard::Cookie(cookie) = send(&mut ours) {
                break cookie;
            }
        };
        theirs.decapsulate(Some(from), &cookie, &mut [0; 256]);
        let mut buffer = [0; 256];
        let TunnResult::WriteToNetwork(message) =
            theirs.format_handshake_initiation(&mut buffer, true)
        else {
            panic!("they do not begin");
        };
        let heard = ours.identity.hear(message, Some(from), now);
        assert!(matches!(heard, Heard::Initiation(_)), "we take ours");
    }

    /// Another's implementation is the proof that this is WireGuard.
    #[test]
    fn speaks_with_boringtun_both_ways() {
        for we_begin in [true, false] {
            let now = Instant::now();
            let keys = [NodeKeyPair::random(), NodeKeyPair::random()];
            let mut ours = End {
                identity: Identity::new(keys[0].clone()),
                tunnel: Tunnel::new(keys[1].public, 7 << 8, now),
                got: Vec::new(),
            };
            let theirs = (*keys[1].private.export().as_bytes()).into();
            let us = (*keys[0].public.export().as_bytes()).into();
            let mut theirs = Tunn::new(theirs, us, None, None, 9, None);
            let packet = crate::packet::udp(
                "100.64.0.1:1".parse().unwrap(),
                "100.64.0.2:2".parse().unwrap(),
                b"hello",
            )
            .unwrap();
            let mut buffer = vec![0; 2048];
            let mut to_them = VecDeque::new();
            let mut to_us = VecDeque::new();
            if we_begin {
                to_them.extend(ours.send(&packet, now));
            } else if let TunnResult::WriteToNetwork(bytes) =
                theirs.encapsulate(&packet, &mut buffer)
            {
                to_us.push_back(bytes.to_vec());
            }
            let mut they_got = Vec::new();
            while !to_us.is_empty() || !to_them.is_empty() {
                if let Some(bytes) = to_us.pop_front() {
                    to_them.extend(ours.receive(&bytes, now));
                }
                let Some(bytes) = to_them.pop_front() else {
                    continue;
                };
                let mut input = bytes.as_slice();
                loop {
                    match theirs.decapsulate(None, input, &mut buffer) {
                        TunnResult::WriteToNetwork(bytes) => to_us.push_back(bytes.to_vec()),
                        TunnResult::WriteToTunnelV4(bytes, _) => {
                            they_got.push(bytes.to_vec());
                            break;
                        }
                        _ => break,
                    }
                    input = &[];
                }
            }
            if we_begin {
                assert_eq!(they_got, std::slice::from_ref(&packet));
                let TunnResult::WriteToNetwork(bytes) = theirs.encapsulate(&packet, &mut buffer)
                else {
                    panic!("they have no session");
                };
                ours.receive(bytes, now);
            }
            assert_eq!(ours.got, [packet]);
        }
    }
}
