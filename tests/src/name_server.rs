use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use hickory_proto::{
    op::{Message, MessageType, ResponseCode},
    rr::{Name, RData, Record},
};

use crate::Underlay;

/// A DNS server on the underlay's router, by UDP and TCP. It ends when it is dropped.
pub struct NameServer {
    ends: Arc<AtomicBool>,
}

/// What it knows.
type Records = Arc<Vec<(Name, RData)>>;

/// How soon it notices that it is to end.
const LOOK: Duration = Duration::from_millis(100);
/// The longest answer by UDP to who does not say that it takes more (RFC 1035).
const MAX_UDP: usize = 512;

impl NameServer {
    /// The server that every host asks.
    pub const PUBLIC: Ipv4Addr = Underlay::ROUTER;
    /// The server that a tailnet names for [`NameServer::OFFICE_ZONE`].
    pub const OFFICE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 53);
    /// What only the office's server knows.
    pub const OFFICE_ZONE: &str = "corp.example";
    /// Where `wiki.DOMAIN` is: every coordination server of these tests has been told.
    pub const WIKI: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);
    /// The hosts' configuration.
    pub(crate) const RESOLV_CONF: &str = "nameserver 10.9.0.1\n";

    /// Starts one at this address, which knows these names and no others.
    pub fn start(underlay: &Underlay, address: Ipv4Addr, records: &[(&str, RData)]) -> NameServer {
        underlay
            .router
            .ip(&format!("address replace {address}/32 dev lo"));
        let name = |text| Name::from_ascii(text).expect("a name");
        let records = records
            .iter()
            .map(|(text, data)| (name(text), data.clone()));
        let records: Records = Arc::new(records.collect());
        let (udp, tcp) = underlay
            .router
            .run(|| {
                Ok((
                    UdpSocket::bind((address, 53))?,
                    TcpListener::bind((address, 53))?,
                ))
            })
            .expect("listen at port 53");
        udp.set_read_timeout(Some(LOOK)).expect("set a timeout");
        tcp.set_nonblocking(true).expect("set non-blocking");
        let ends = Arc::new(AtomicBool::new(false));
        let (known, ended) = (records.clone(), ends.clone());
        thread::spawn(move || {
            let mut question = [0; 1500];
            while !ended.load(Ordering::Relaxed) {
                if let Ok((length, from)) = udp.recv_from(&mut question)
                    && let Some(answer) = answer(&known, &question[..length], MAX_UDP)
                {
                    // Whoever asked may be gone, and asks again if not.
                    let _ = udp.send_to(&answer, from);
                }
            }
        });
        let ended = ends.clone();
        thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                match tcp.accept() {
                    // One that breaks off has its answer or wants none.
                    Ok((stream, _)) => drop(serve(&records, stream)),
                    Err(_) => thread::sleep(LOOK),
                }
            }
        });
        NameServer { ends }
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
    }
}

/// Answers the one question of a connection.
fn serve(records: &Records, mut stream: TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut question = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut question)?;
    if let Some(answer) = answer(records, &question, usize::from(u16::MAX)) {
        stream.write_all(&(answer.len() as u16).to_be_bytes())?;
        stream.write_all(&answer)?;
    }
    Ok(())
}

fn answer(records: &Records, question: &[u8], room: usize) -> Option<Vec<u8>> {
    let asked = Message::from_vec(question).ok()?;
    let query = asked.queries.first()?.clone();
    let mut answer = Message::new(asked.id, MessageType::Response, asked.op_code);
    answer.metadata.recursion_available = true;
    answer.add_query(query.clone());
    let named: Vec<_> = records
        .iter()
        .filter(|(name, _)| name == query.name())
        .collect();
    if named.is_empty() {
        answer.metadata.response_code = ResponseCode::NXDomain;
    }
    for (name, data) in named {
        if data.record_type() == query.query_type() {
            answer.add_answer(Record::from_rdata(name.clone(), 60, data.clone()));
        }
    }
    let bytes = answer.to_vec().ok()?;
    if bytes.len() <= room {
        return Some(bytes);
    }
    answer.answers.clear();
    answer.metadata.truncation = true;
    answer.to_vec().ok()
}
