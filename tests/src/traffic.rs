//! What programs in a namespace do: pings, questions, streams.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, RecordType},
};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use crate::Namespace;

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

    fn query(
        &self,
        server: SocketAddr,
        name: &str,
        kind: RecordType,
    ) -> Result<Vec<RData>, ResponseCode> {
        let answer = self
            .exchange(server, name, kind)
            .unwrap_or_else(|error| panic!("{server} is asked for {name}: {error}"));
        match answer.metadata.response_code {
            ResponseCode::NoError => Ok(answer
                .answers
                .into_iter()
                .map(|record| record.data)
                .collect()),
            refusal => Err(refusal),
        }
    }

    fn exchange(&self, server: SocketAddr, name: &str, kind: RecordType) -> io::Result<Message> {
        let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        let name = Name::from_ascii(name).map_err(io::Error::other)?;
        message.add_query(Query::query(name, kind));
        let message = message.to_vec().map_err(io::Error::other)?;
        self.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(Some(Duration::from_secs(6)))?;
            socket.connect(server)?;
            socket.send(&message)?;
            let mut answer = [0; 4096];
            let length = socket.recv(&mut answer)?;
            Message::from_vec(&answer[..length]).map_err(io::Error::other)
        })
    }

    /// Opens a port and returns every byte to its sender, for one connection.
    pub fn echo(&self, port: u16) -> io::Result<()> {
        let listener = self.run(|| TcpListener::bind(("::", port)))?;
        thread::spawn(move || -> io::Result<u64> {
            let (mut stream, _) = listener.accept()?;
            io::copy(&mut stream.try_clone()?, &mut stream)
        });
        Ok(())
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
            stream.read_to_end(&mut answer)?;
            writer.join().expect("the writer")?;
            Ok(answer)
        })
    }
}
