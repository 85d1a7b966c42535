//! What programs in a namespace do: pings, questions, streams, datagrams.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, RecordType},
};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket, sockopt::RcvBufForce,
};

use crate::{Namespace, eventually};

/// How long an answer of a DNS server is waited for; the node itself gives others 5 s.
const ANSWER: Duration = Duration::from_secs(6);

impl Namespace {
    /// Sends one echo request and waits for its answer.
    pub fn ping(&self, to: IpAddr) -> io::Result<()> {
        self.ping_within(to, Duration::from_secs(5))
    }

    /// The same, with less or more patience.
    pub fn ping_within(&self, to: IpAddr, patience: Duration) -> io::Result<()> {
        let (family, protocol, echo, reply) = match to {
            IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8, 0),
            IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129),
        };
        // The kernel fills in the identifier and the sum.
        let request = [&[echo, 0, 0, 0, 0, 0, 0, 1], &b"are you there?"[..]].concat();
        let mut answer = [0; 64];
        let length = self.run(|| {
            let socket: UdpSocket =
                socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)?.into();
            socket.set_read_timeout(Some(patience))?;
            socket.connect((to, 0))?;
            socket.send(&request)?;
            socket.recv(&mut answer)
        })?;
        assert_eq!(answer[0], reply);
        assert_eq!(answer[8..length], request[8..]);
        Ok(())
    }

    /// Asks a DNS server for a name's addresses: the IPv4 and IPv6 ones, or why there are none.
    pub fn resolve(&self, server: SocketAddr, name: &str) -> Result<Vec<IpAddr>, ResponseCode> {
        let mut addresses = Vec::new();
        for kind in [RecordType::A, RecordType::AAAA] {
            let answers = self.query(server, name, kind)?;
            addresses.extend(answers.iter().filter_map(|data| match data {
                RData::A(ip) => Some(IpAddr::from(ip.0)),
                RData::AAAA(ip) => Some(IpAddr::from(ip.0)),
                _ => None,
            }));
        }
        Ok(addresses)
    }

    /// Asks a DNS server for the names of an address, or why there are none.
    pub fn names_of(&self, server: SocketAddr, ip: IpAddr) -> Result<Vec<String>, ResponseCode> {
        let name = Name::from(ip).to_ascii();
        let answers = self.query(server, &name, RecordType::PTR)?;
        let names = answers.iter().filter_map(|data| match data {
            RData::PTR(name) => Some(name.0.to_ascii()),
            _ => None,
        });
        Ok(names.collect())
    }

    /// Asks a DNS server for a name's text, by TCP where the answer is cut by UDP. Returns whether
    /// it was, too; or why there is none.
    pub fn text_of(&self, server: SocketAddr, name: &str) -> Result<(String, bool), ResponseCode> {
        let mut answer = self.ask(server, name, RecordType::TXT, Self::by_udp);
        let cut = answer.truncation;
        if cut {
            assert!(answer.answers.is_empty(), "half an answer by UDP");
            answer = self.ask(server, name, RecordType::TXT, Self::by_tcp);
        }
        let mut text = String::new();
        for data in records(answer)? {
            if let RData::TXT(strings) = data {
                text.extend(
                    strings
                        .txt_data
                        .iter()
                        .map(|part| String::from_utf8_lossy(part)),
                );
            }
        }
        Ok((text, cut))
    }

    fn query(
        &self,
        server: SocketAddr,
        name: &str,
        kind: RecordType,
    ) -> Result<Vec<RData>, ResponseCode> {
        records(self.ask(server, name, kind, Self::by_udp))
    }

    fn ask(
        &self,
        server: SocketAddr,
        name: &str,
        kind: RecordType,
        exchange: fn(&Self, SocketAddr, &[u8]) -> io::Result<Vec<u8>>,
    ) -> Message {
        let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        let full = Name::from_ascii(name).expect("a name");
        message.add_query(Query::query(full, kind));
        let message = message.to_vec().expect("a question");
        let answer = exchange(self, server, &message)
            .unwrap_or_else(|error| panic!("{server} is asked for {name}: {error}"));
        Message::from_vec(&answer)
            .unwrap_or_else(|error| panic!("{server} is asked for {name}: {error}"))
    }

    fn by_udp(&self, server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
        let socket = self.run(|| UdpSocket::bind("0.0.0.0:0"))?;
        socket.set_read_timeout(Some(ANSWER))?;
        socket.connect(server)?;
        socket.send(question)?;
        let mut answer = vec![0; 4096];
        let length = socket.recv(&mut answer)?;
        answer.truncate(length);
        Ok(answer)
    }

    fn by_tcp(&self, server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
        let mut stream = self.run(|| TcpStream::connect_timeout(&server, ANSWER))?;
        stream.set_read_timeout(Some(ANSWER))?;
        let length = u16::try_from(question.len()).map_err(io::Error::other)?;
        stream.write_all(&[&length.to_be_bytes(), question].concat())?;
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut answer = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut answer)?;
        Ok(answer)
    }

    /// Opens a port and returns every byte to its sender, for one connection.
    pub fn echo(&self, port: u16) -> io::Result<()> {
        self.echo_times(port, 1)
    }

    /// The same for so many connections, one after the other.
    pub fn echo_times(&self, port: u16, count: usize) -> io::Result<()> {
        let listener = self.run(|| TcpListener::bind(("::", port)))?;
        thread::spawn(move || -> io::Result<()> {
            for _ in 0..count {
                let (mut stream, _) = listener.accept()?;
                io::copy(&mut stream.try_clone()?, &mut stream)?;
            }
            Ok(())
        });
        Ok(())
    }

    /// Begins to send bytes to an echo, some megabytes a second, and to check those that return.
    pub fn flow(&self, to: SocketAddr) -> io::Result<Flow> {
        let stream = self.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(10)))?;
        Flow::begin(stream)
    }

    /// Sends numbered datagrams of these lengths to a port of `to`, some megabytes a second. A
    /// number must find room: the first 255 may be of any length, later ones have 2 bytes or more.
    pub fn datagrams(
        &self,
        to: &Namespace,
        address: IpAddr,
        lengths: &[usize],
    ) -> io::Result<Delivery> {
        let bind = || UdpSocket::bind("[::]:0");
        let (sender, receiver) = (self.run(bind)?, to.run(bind)?);
        setsockopt(&receiver, RcvBufForce, &(8 << 20))?;
        receiver.set_read_timeout(Some(Duration::from_secs(2)))?;
        sender.connect((address, receiver.local_addr()?.port()))?;
        let expected: Vec<Vec<u8>> = (0..lengths.len())
            .map(|number| datagram(number as u32, lengths[number]))
            .collect();
        let mut delivery = Delivery {
            lost: lengths.len(),
            ..Delivery::default()
        };
        thread::scope(|scope| {
            let sending = scope.spawn(|| -> io::Result<()> {
                for burst in expected.chunks(8) {
                    for datagram in burst {
                        sender.send(datagram)?;
                    }
                    thread::sleep(Duration::from_millis(4));
                }
                Ok(())
            });
            let mut arrived = vec![false; lengths.len()];
            let mut buffer = vec![0; 1 << 16];
            while delivery.lost > 0 || !sending.is_finished() {
                let datagram = match receiver.recv(&mut buffer) {
                    Ok(length) => &buffer[..length],
                    Err(_) if sending.is_finished() => break,
                    Err(_) => continue,
                };
                let mut number = [0; 4];
                let known = datagram.len().min(4);
                number[..known].copy_from_slice(&datagram[..known]);
                let number = u32::from_le_bytes(number) as usize;
                if expected.get(number).is_none_or(|sent| sent != datagram) {
                    delivery.damaged += 1;
                } else if std::mem::replace(&mut arrived[number], true) {
                    delivery.doubled += 1;
                } else {
                    delivery.lost -= 1;
                }
            }
            sending.join().expect("the sender")
        })?;
        Ok(delivery)
    }

    /// Sends bytes to an echo and returns what comes back.
    pub fn send(&self, to: SocketAddr, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let limit = Some(Duration::from_secs(20));
        let mut stream = self.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(10)))?;
        stream.set_read_timeout(limit)?;
        stream.set_write_timeout(limit)?;
        thread::scope(|scope| {
            let mut writing = stream.try_clone()?;
            let writer = scope.spawn(move || {
                writing.write_all(bytes)?;
                writing.shutdown(Shutdown::Write)
            });
            let mut answer = Vec::new();
            let read = stream.read_to_end(&mut answer);
            if read.is_err() {
                stream.shutdown(Shutdown::Both)?;
            }
            writer.join().expect("the writer").and(read)?;
            Ok(answer)
        })
    }
}

/// What became of numbered datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delivery {
    /// Those that never arrived.
    pub lost: usize,
    /// Those that arrived again.
    pub doubled: usize,
    /// Those that nobody sent so.
    pub damaged: usize,
}

fn datagram(number: u32, length: usize) -> Vec<u8> {
    let mut bytes = noise(u64::from(number) + 1, length);
    let known = length.min(4);
    bytes[..known].copy_from_slice(&number.to_le_bytes()[..known]);
    bytes
}

/// A TCP stream to an echo that goes on until it is dropped.
pub struct Flow {
    _stream: Hangup,
    ends: Arc<AtomicBool>,
    returned: Arc<AtomicU64>,
    writer: JoinHandle<io::Result<u64>>,
    reader: JoinHandle<io::Result<()>>,
}

impl Flow {
    fn begin(stream: TcpStream) -> io::Result<Flow> {
        let ends = Arc::new(AtomicBool::new(false));
        let returned = Arc::new(AtomicU64::new(0));
        // Over and over; of a length that no packet's or window's divides.
        let bytes = Arc::new(noise(1, 1_000_003));
        let (mut writing, mut reading) = (stream.try_clone()?, stream.try_clone()?);
        let (stop, sent) = (ends.clone(), bytes.clone());
        let writer = thread::spawn(move || {
            let mut count = 0;
            for piece in sent.chunks(16 << 10).cycle() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                writing.write_all(piece)?;
                count += piece.len() as u64;
                thread::sleep(Duration::from_millis(5));
            }
            writing.shutdown(Shutdown::Write)?;
            Ok(count)
        });
        let counter = returned.clone();
        let reader = thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let at = (counter.load(Ordering::Relaxed) % bytes.len() as u64) as usize;
                let room = buffer.len().min(bytes.len() - at);
                let length = reading.read(&mut buffer[..room])?;
                if length == 0 {
                    return Ok(());
                }
                assert!(
                    buffer[..length] == bytes[at..at + length],
                    "other bytes than were sent"
                );
                counter.fetch_add(length as u64, Ordering::Relaxed);
            }
        });
        Ok(Flow {
            _stream: Hangup(stream),
            ends,
            returned,
            writer,
            reader,
        })
    }

    /// How many bytes have returned so far, all of them right.
    pub fn returned(&self) -> u64 {
        self.returned.load(Ordering::Relaxed)
    }

    /// Ends it and waits for the rest. Panics unless every byte returned once and in order.
    pub fn finish(self) {
        self.ends.store(true, Ordering::Relaxed);
        eventually("the last bytes return", Duration::from_secs(30), || {
            self.reader.is_finished()
        });
        let sent = self.writer.join().expect("the writer");
        self.reader
            .join()
            .expect("the reader")
            .expect("the last bytes");
        assert_eq!(sent.expect("write"), self.returned.load(Ordering::Relaxed));
    }
}

/// Ends what its threads wait for.
struct Hangup(TcpStream);

impl Drop for Hangup {
    fn drop(&mut self) {
        // An error says that the other end was quicker.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Bytes like those of chance, the same each time: none is lost, doubled or moved unseen.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut noise = Noise::new(seed);
    let mut bytes = vec![0; length];
    for piece in bytes.chunks_mut(8) {
        piece.copy_from_slice(&noise.number().to_le_bytes()[..piece.len()]);
    }
    bytes
}

/// Numbers like those of chance (xorshift64*).
pub(crate) struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Noise {
        Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

fn records(answer: Message) -> Result<Vec<RData>, ResponseCode> {
    match answer.metadata.response_code {
        ResponseCode::NoError => {
            let records = answer.answers.into_iter();
            Ok(records.map(|record| record.data).collect())
        }
        refusal => Err(refusal),
    }
}
