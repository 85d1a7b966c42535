//! DNS by TCP: a small stack of our own that ends connections read from the TUN device.
//!
//! Packets, answers and the time go in, packets and questions come out. Nothing listens in the
//! container, so a DNS server there keeps its port, and every address can be served.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use smoltcp::{
    iface::{Config, Interface, SocketHandle, SocketSet},
    phy::{self, Checksum, DeviceCapabilities, Medium},
    socket::tcp::{Socket, SocketBuffer, State},
    time::Instant as Time,
    wire::HardwareAddress,
};

/// DNS's port.
const PORT: u16 = 53;
/// Connections at one time; more are refused.
const MAX_CONNECTIONS: usize = 16;
/// How long a connection may be idle (RFC 7766, section 6.2.3, wants some seconds).
const IDLE: Duration = Duration::from_secs(10);
/// Questions of one connection that wait for answers; more wait in the client.
const MAX_WAITING: usize = 32;
/// The longest question taken; real ones have a few hundred bytes.
const MAX_QUESTION: usize = 4096;
/// Bytes of answers that may wait before no more questions are read.
const MAX_UNSENT: usize = 128 * 1024;
const RECEIVE_BUFFER: usize = 2048;
const SEND_BUFFER: usize = 8192;
/// Every tailnet's MTU.
const MTU: usize = 1280;

/// One connection; numbers are not used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionId(u64);

/// Connections of the container to port 53 of any address.
pub struct Stack {
    epoch: Instant,
    interface: Interface,
    wire: Wire,
    sockets: SocketSet<'static>,
    /// The socket that becomes the next connection; none when there are too many.
    listener: Option<SocketHandle>,
    connections: Vec<Connection>,
    next_id: u64,
    questions: Vec<(ConnectionId, Vec<u8>)>,
}

struct Connection {
    id: ConnectionId,
    handle: SocketHandle,
    /// Bytes that are not yet a whole question.
    received: Vec<u8>,
    /// Answers that the socket has no room for yet.
    unsent: VecDeque<u8>,
    /// Questions that are not answered yet.
    waiting: usize,
    /// When it last asked or was answered.
    active: Instant,
}

impl Stack {
    /// A stack without connections.
    pub fn new(now: Instant) -> Self {
        let mut wire = Wire::default();
        let mut config = Config::new(HardwareAddress::Ip);
        // Initial sequence numbers come from it.
        config.random_seed = rand::random();
        let mut interface = Interface::new(config, &mut wire, Time::ZERO);
        interface.set_any_ip(true);
        let mut stack = Self {
            epoch: now,
            interface,
            wire,
            sockets: SocketSet::new(Vec::new()),
            listener: None,
            connections: Vec::new(),
            next_id: 0,
            questions: Vec::new(),
        };
        stack.listen();
        stack
    }

    /// Takes a TCP packet of the container.
    pub fn receive(&mut self, packet: &[u8], now: Instant) {
        self.wire.incoming = Some(packet.to_vec());
        self.advance(now);
    }

    /// Answers a question; in vain if the connection is gone.
    pub fn answer(&mut self, to: ConnectionId, answer: &[u8], now: Instant) {
        let connection = self
            .connections
            .iter_mut()
            .find(|connection| connection.id == to);
        if let (Some(connection), Ok(length)) = (connection, u16::try_from(answer.len())) {
            connection.unsent.extend(length.to_be_bytes());
            connection.unsent.extend(answer);
            connection.waiting = connection.waiting.saturating_sub(1);
            connection.active = now;
            self.advance(now);
        }
    }

    /// Lets time pass.
    pub fn advance(&mut self, now: Instant) {
        let time = self.time(now);
        self.interface.poll(time, &mut self.wire, &mut self.sockets);
        if let Some(handle) = self.listener
            && self.sockets.get::<Socket<'_>>(handle).state() != State::Listen
        {
            self.listener = None;
            self.connections.push(Connection {
                id: ConnectionId(self.next_id),
                handle,
                received: Vec::new(),
                unsent: VecDeque::new(),
                waiting: 0,
                active: now,
            });
            self.next_id += 1;
        }
        let (sockets, questions) = (&mut self.sockets, &mut self.questions);
        for connection in &mut self.connections {
            connection.advance(sockets.get_mut(connection.handle), questions, now);
        }
        self.interface.poll(time, &mut self.wire, &mut self.sockets);
        let sockets = &mut self.sockets;
        self.connections.retain(|connection| {
            // The container's side is done when ours is in TIME-WAIT; nothing else could come.
            let state = sockets.get::<Socket<'_>>(connection.handle).state();
            let gone = matches!(state, State::Closed | State::TimeWait);
            if gone {
                sockets.remove(connection.handle);
            }
            !gone
        });
        self.listen();
    }

    /// When to call [`Self::advance`] even though nothing came; `None`: there is no connection, and
    /// the stack may be dropped.
    pub fn next_advance(&mut self, now: Instant) -> Option<Instant> {
        let idle = self
            .connections
            .iter()
            .map(|connection| connection.active + IDLE)
            .min()?;
        // One that is too old but still there waits for answers or for the client's last words.
        let idle = idle.max(now + Duration::from_secs(1));
        let delay = self.interface.poll_delay(self.time(now), &self.sockets);
        Some(delay.map_or(idle, |delay| idle.min(now + delay.into())))
    }

    /// Packets for the container.
    pub fn packets(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.wire.outgoing)
    }

    /// Questions that have come.
    pub fn questions(&mut self) -> Vec<(ConnectionId, Vec<u8>)> {
        std::mem::take(&mut self.questions)
    }

    fn time(&self, now: Instant) -> Time {
        let age = now.saturating_duration_since(self.epoch);
        Time::from_micros(i64::try_from(age.as_micros()).unwrap_or(i64::MAX))
    }

    fn listen(&mut self) {
        if self.listener.is_some() || self.connections.len() >= MAX_CONNECTIONS {
            return;
        }
        let buffer = |size| SocketBuffer::new(vec![0; size]);
        let mut socket = Socket::new(buffer(RECEIVE_BUFFER), buffer(SEND_BUFFER));
        socket.set_nagle_enabled(false);
        match socket.listen(PORT) {
            Ok(()) => self.listener = Some(self.sockets.add(socket)),
            Err(error) => tracing::error!(%error, "DNS by TCP cannot be served"),
        }
    }
}

impl Connection {
    fn advance(
        &mut self,
        socket: &mut Socket<'_>,
        questions: &mut Vec<(ConnectionId, Vec<u8>)>,
        now: Instant,
    ) {
        while self.waiting < MAX_WAITING && self.unsent.len() < MAX_UNSENT {
            if let Some(question) = self.question() {
                match question {
                    Some(question) => questions.push((self.id, question)),
                    None => return socket.abort(),
                }
                self.waiting += 1;
                self.active = now;
                continue;
            }
            let read = socket.recv(|bytes| {
                self.received.extend_from_slice(bytes);
                (bytes.len(), bytes.len())
            });
            if !matches!(read, Ok(1..)) {
                break;
            }
        }
        while !self.unsent.is_empty() {
            match socket.send_slice(self.unsent.as_slices().0) {
                Ok(sent @ 1..) => self.unsent.drain(..sent),
                _ => break,
            };
        }
        let done = self.waiting == 0 && self.unsent.is_empty();
        let age = now.saturating_duration_since(self.active);
        if age >= 2 * IDLE {
            socket.abort();
        } else if done
            && (age >= IDLE || !socket.may_recv() && socket.state() != State::SynReceived)
        {
            socket.close();
        }
    }

    /// The next whole question; `Some(None)` if it is too long.
    fn question(&mut self) -> Option<Option<Vec<u8>>> {
        let (length, rest) = self.received.split_first_chunk()?;
        let length = usize::from(u16::from_be_bytes(*length));
        if length > MAX_QUESTION {
            return Some(None);
        }
        let question = rest.get(..length)?.to_vec();
        self.received.drain(..2 + length);
        Some(Some(question))
    }
}

/// The packets between the stack and the container.
#[derive(Default)]
struct Wire {
    incoming: Option<Vec<u8>>,
    outgoing: Vec<Vec<u8>>,
}

impl phy::Device for Wire {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _now: Time) -> Option<(Incoming, Outgoing<'_>)> {
        let packet = self.incoming.take()?;
        Some((Incoming(packet), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _now: Time) -> Option<Outgoing<'_>> {
        Some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // The container's kernel may leave checksums to the device, and nothing gets damaged on
        // the way from there; so they are written but not verified.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

struct Incoming(Vec<u8>);

impl phy::RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

struct Outgoing<'a>(&'a mut Vec<Vec<u8>>);

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let mut packet = vec![0; length];
        let result = write(&mut packet);
        self.0.push(packet);
        result
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::{IpAddr, SocketAddr};

    use proptest::{collection::vec, prelude::*};
    use smoltcp::wire::IpCidr;

    use super::*;
    use crate::packet::{
        tcp_flags::{ACK, FIN, RST, SYN},
        tests::tcp,
    };

    /// The container's end of connections.
    pub(crate) struct Container {
        interface: Interface,
        wire: Wire,
        sockets: SocketSet<'static>,
        now: Time,
    }

    impl Container {
        pub(crate) fn new() -> Self {
            let mut wire = Wire::default();
            let mut interface =
                Interface::new(Config::new(HardwareAddress::Ip), &mut wire, Time::ZERO);
            let addresses =
                ["100.64.0.1", "fd7a:115c:a1e0::1"].map(|a| a.parse::<IpAddr>().unwrap());
            interface.update_ip_addrs(|list| {
                for address in addresses {
                    list.push(IpCidr::new(address.into(), 0)).unwrap();
                }
            });
            let sockets = SocketSet::new(Vec::new());
            Self {
                interface,
                wire,
                sockets,
                now: Time::ZERO,
            }
        }

        pub(crate) fn connect(&mut self, server: SocketAddr, port: u16) -> SocketHandle {
            let buffer = || SocketBuffer::new(vec![0; 65536]);
            let mut socket = Socket::new(buffer(), buffer());
            socket
                .connect(self.interface.context(), server, port)
                .unwrap();
            self.sockets.add(socket)
        }

        pub(crate) fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
            self.sockets.get_mut(handle)
        }

        pub(crate) fn ask(&mut self, handle: SocketHandle, question: &[u8]) {
            let bytes = [&(question.len() as u16).to_be_bytes(), question].concat();
            assert_eq!(self.socket(handle).send_slice(&bytes), Ok(bytes.len()));
        }

        /// Takes the whole answer that has come, if one has.
        pub(crate) fn answer(&mut self, handle: SocketHandle) -> Option<Vec<u8>> {
            let socket = self.socket(handle);
            let queued = socket.recv_queue();
            let length = match socket.peek(2).ok()? {
                [a, b] => usize::from(u16::from_be_bytes([*a, *b])),
                _ => return None,
            };
            if queued < 2 + length {
                return None;
            }
            let mut answer = vec![0; 2 + length];
            socket.recv_slice(&mut answer).unwrap();
            answer.drain(..2);
            Some(answer)
        }

        /// Takes a packet and gives those that the container sends.
        pub(crate) fn exchange(&mut self, packet: Option<Vec<u8>>) -> Vec<Vec<u8>> {
            self.wire.incoming = packet;
            self.now += smoltcp::time::Duration::from_millis(1);
            self.interface
                .poll(self.now, &mut self.wire, &mut self.sockets);
            std::mem::take(&mut self.wire.outgoing)
        }
    }

    /// Lets packets flow until both are quiet.
    fn settle(container: &mut Container, stack: &mut Stack, now: Instant) {
        let mut sent = container.exchange(None);
        stack.advance(now);
        loop {
            for packet in std::mem::take(&mut sent) {
                stack.receive(&packet, now);
            }
            let replies = stack.packets();
            if replies.is_empty() {
                break;
            }
            for packet in replies {
                sent.extend(container.exchange(Some(packet)));
            }
        }
    }

    const SERVER: &str = "100.100.100.100:53";

    fn server() -> SocketAddr {
        SERVER.parse().unwrap()
    }

    #[test]
    fn questions_in_and_answers_out() {
        let now = Instant::now();
        for server in [
            SERVER,
            "[fd7a:115c:a1e0::53]:53",
            "8.8.8.8:53",
            "[2001:4860:4860::8888]:53",
        ] {
            let (mut container, mut stack) = (Container::new(), Stack::new(now));
            let client = container.connect(server.parse().unwrap(), 4000);
            settle(&mut container, &mut stack, now);
            container.ask(client, b"first");
            container.ask(client, b"second");
            settle(&mut container, &mut stack, now);
            let asked = stack.questions();
            let texts: Vec<_> = asked.iter().map(|(_, question)| &question[..]).collect();
            assert_eq!(texts, [&b"first"[..], b"second"], "{server}");
            // The second answer comes first, and is longer than all buffers together.
            stack.answer(asked[1].0, &[2; 60_000], now);
            stack.answer(asked[0].0, &[1; 100], now);
            settle(&mut container, &mut stack, now);
            assert_eq!(container.answer(client), Some(vec![2; 60_000]));
            assert_eq!(container.answer(client), Some(vec![1; 100]));
            container.socket(client).close();
            settle(&mut container, &mut stack, now);
            assert_eq!(stack.next_advance(now), None, "nothing is left");
            stack.answer(asked[0].0, b"too late", now);
        }
    }

    #[test]
    fn idle_connections_are_closed() {
        let now = Instant::now();
        let (mut container, mut stack) = (Container::new(), Stack::new(now));
        let client = container.connect(server(), 4000);
        settle(&mut container, &mut stack, now);
        let due = stack.next_advance(now).unwrap();
        assert!(due <= now + IDLE);
        settle(&mut container, &mut stack, now + IDLE);
        assert_eq!(container.socket(client).state(), State::CloseWait);
        // A client that stays silent is cut off.
        let stray = container.connect(server(), 4001);
        settle(&mut container, &mut stack, now + IDLE);
        container.ask(stray, b"never answered");
        settle(&mut container, &mut stack, now + IDLE);
        stack.advance(now + 4 * IDLE);
        assert_eq!(stack.next_advance(now + 4 * IDLE), None);
    }

    #[test]
    fn there_is_a_limit() {
        let now = Instant::now();
        let (mut container, mut stack) = (Container::new(), Stack::new(now));
        let clients: Vec<_> = (0..20)
            .map(|n| container.connect(server(), 4000 + n))
            .collect();
        settle(&mut container, &mut stack, now);
        let open = |container: &mut Container| {
            clients
                .iter()
                .filter(|client| container.socket(**client).may_send())
                .count()
        };
        assert_eq!(open(&mut container), MAX_CONNECTIONS);
        container.socket(clients[0]).close();
        settle(&mut container, &mut stack, now);
        let next = container.connect(server(), 5000);
        settle(&mut container, &mut stack, now);
        assert!(container.socket(next).may_send(), "room again");
    }

    #[test]
    fn endless_questions_end_the_connection() {
        let now = Instant::now();
        let (mut container, mut stack) = (Container::new(), Stack::new(now));
        let client = container.connect(server(), 4000);
        settle(&mut container, &mut stack, now);
        container.socket(client).send_slice(&[0xff; 10]).unwrap();
        settle(&mut container, &mut stack, now);
        assert!(!container.socket(client).is_open());
        assert_eq!(stack.next_advance(now), None);
    }

    proptest! {
        #[test]
        fn no_packets_panic(
            segments in vec((0u8..64, 0u16..3, vec(any::<u8>(), 0..40), any::<prop::sample::Index>(), any::<u8>()), 1..30),
        ) {
            let now = Instant::now();
            let mut stack = Stack::new(now);
            for (flags, port, data, at, byte) in segments {
                let flags = flags & (SYN | ACK | FIN | RST);
                let mut packet = tcp(SocketAddr::new("100.64.0.1".parse().unwrap(), 4000 + port), server(), flags);
                packet.extend(data);
                let length = packet.len() as u16;
                packet[2..4].copy_from_slice(&length.to_be_bytes());
                let at = at.index(packet.len());
                packet[at] = byte;
                stack.receive(&packet, now);
                stack.packets();
            }
        }
    }
}
