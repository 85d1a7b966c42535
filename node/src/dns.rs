//! MagicDNS: answers the container's questions from packets read off its TUN device.
//!
//! | module | what |
//! |---|---|
//! | [`zone`] | the names of a tailnet |
//! | [`message`] | questions and answers as bytes |
//! | [`tcp`] | connections of clients that ask by TCP |
//! | [`upstream`] | the servers that know all other names |
//! | [`peers`] | those of them that are in the tailnet |

mod message;
mod peers;
mod tcp;
mod upstream;
mod zone;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tracing::Instrument;

pub use self::peers::Peers;
use self::{
    message::{Request, Unanswerable},
    tcp::{ConnectionId, Stack},
    zone::{Answer, Way},
};
pub use self::{upstream::Upstreams, zone::Zone};
use crate::packet::{self, Packet, Transport};

/// Where MagicDNS is asked (net/tsaddr/tsaddr.go).
const SERVICE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(100, 100, 100, 100));
/// The same by IPv6 (net/tsaddr/tsaddr.go).
const SERVICE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0x53));
/// Questions that may wait for other servers; more are answered with SERVFAIL.
const MAX_FORWARDED: usize = 256;
/// Packets that may wait for the resolver; more are dropped, and clients ask again.
const QUEUE: usize = 128;

/// The DNS server of one node. It ends when it is dropped.
#[derive(Debug)]
pub struct Resolver {
    packets: mpsc::Sender<Vec<u8>>,
    siblings: watch::Sender<Vec<Zone>>,
    peers: Peers,
}

impl Resolver {
    /// Answers from `zone` and asks `upstreams` for all else; `replies` are IP packets for the
    /// container. Must be called within a tokio runtime.
    pub fn new(zone: Zone, replies: mpsc::Sender<Vec<u8>>, upstreams: Upstreams) -> Self {
        let (packets, inbox) = mpsc::channel(QUEUE);
        let (siblings, siblings_seen) = watch::channel(Vec::new());
        let peers = Peers::default();
        let server = Server {
            zone,
            siblings: siblings_seen,
            upstreams,
            replies,
            stack: None,
            peers: peers.clone(),
            forwarded: JoinSet::new(),
        };
        tokio::spawn(server.run(inbox).in_current_span());
        Self {
            packets,
            siblings,
            peers,
        }
    }

    /// Takes a packet that the container sent to a service address, or to port 53 of any other;
    /// the answer comes from the address that was asked. Never waits.
    pub fn handle(&self, packet: &[u8]) {
        if let Err(error) = self.packets.try_send(packet.to_vec()) {
            tracing::debug!(%error, "dropped a DNS question");
        }
    }

    /// Opens the way to servers that are peers: `questions` takes IP packets to be sent as if the
    /// container had. Without it, such servers are not asked.
    pub fn ask_peers(&self, questions: mpsc::Sender<Vec<u8>>) {
        self.peers.open(questions);
    }

    /// What takes the answers to the questions of [`Self::ask_peers`]: they are not for the container.
    pub fn answers(&self) -> Peers {
        self.peers.clone()
    }

    /// Names the other tailnets that the container is in: it finds their names, too.
    pub fn set_siblings(&self, zones: Vec<Zone>) {
        self.siblings.send_replace(zones);
    }
}

/// Who asked.
#[derive(Clone, Copy, Debug)]
enum Client {
    Udp { asked: SocketAddr, from: SocketAddr },
    Tcp(ConnectionId),
}

struct Server {
    zone: Zone,
    siblings: watch::Receiver<Vec<Zone>>,
    upstreams: Upstreams,
    replies: mpsc::Sender<Vec<u8>>,
    /// Made for the first connection, dropped with the last one.
    stack: Option<Stack>,
    peers: Peers,
    /// Questions that other servers are being asked.
    forwarded: JoinSet<(Client, Request, Option<Vec<u8>>)>,
}

impl Server {
    async fn run(mut self, mut inbox: mpsc::Receiver<Vec<u8>>) {
        loop {
            let now = std::time::Instant::now();
            let deadline = self
                .stack
                .as_mut()
                .and_then(|stack| stack.next_advance(now));
            let due = async {
                match deadline {
                    Some(deadline) => sleep_until(Instant::from_std(deadline)).await,
                    None => std::future::pending().await,
                }
            };
            let mut replies = Vec::new();
            tokio::select! {
                packet = inbox.recv() => match packet {
                    Some(packet) => self.receive(&packet, &mut replies),
                    None => return,
                },
                Some(answered) = self.forwarded.join_next() => match answered {
                    Ok((client, request, answer)) => {
                        let answer = answer.map_or_else(|| request.fail(), |answer| request.pass_on(answer));
                        self.reply(client, &request, answer, &mut replies);
                    }
                    Err(error) => tracing::error!(%error, "asking a DNS server failed"),
                },
                () = due => {
                    if let Some(stack) = &mut self.stack {
                        stack.advance(std::time::Instant::now());
                    }
                }
            }
            self.serve_stack(&mut replies);
            for reply in replies {
                if self.replies.send(reply).await.is_err() {
                    return;
                }
            }
        }
    }

    fn receive(&mut self, bytes: &[u8], replies: &mut Vec<Vec<u8>>) {
        let packet = match Packet::parse(bytes) {
            Ok(packet) if !packet.is_fragment() => packet,
            _ => return tracing::debug!("dropped a DNS question in a packet that cannot be read"),
        };
        match packet.transport() {
            Transport::Udp { src, dst: dst @ 53 } => {
                let client = Client::Udp {
                    asked: SocketAddr::new(packet.dst(), dst),
                    from: SocketAddr::new(packet.src(), src),
                };
                self.question(client, packet.payload().to_vec(), replies);
            }
            // Other ports are refused there, sooner than a client would give up.
            Transport::Tcp { .. } => {
                let now = std::time::Instant::now();
                let stack = self.stack.get_or_insert_with(|| Stack::new(now));
                stack.receive(packet.bytes(), now);
            }
            Transport::Icmp(_) => replies.extend(packet::echo_reply(&packet)),
            _ => {}
        }
    }

    /// Moves questions and packets out of the stack, and forgets it without connections.
    fn serve_stack(&mut self, replies: &mut Vec<Vec<u8>>) {
        // Each answer may make room for the next question of a connection.
        while let Some(stack) = &mut self.stack {
            replies.extend(stack.packets());
            let questions = stack.questions();
            if questions.is_empty() {
                break;
            }
            for (connection, question) in questions {
                self.question(Client::Tcp(connection), question, replies);
            }
        }
        let now = std::time::Instant::now();
        if self
            .stack
            .as_mut()
            .is_some_and(|stack| stack.next_advance(now).is_none())
        {
            self.stack = None;
        }
    }

    fn question(&mut self, client: Client, bytes: Vec<u8>, replies: &mut Vec<Vec<u8>>) {
        let request = match Request::parse(bytes) {
            Ok(request) => request,
            Err(Unanswerable::Reply(reply)) => return self.send(client, reply, replies),
            Err(Unanswerable::Ignore) => return,
        };
        let known = match request.kind() {
            Some(kind) => {
                let siblings = self.siblings.borrow();
                let zones = std::iter::once(&self.zone).chain(siblings.iter());
                Zone::lookup(zones, request.name(), kind)
            }
            None => Answer::NotMine,
        };
        let servers = match known {
            Answer::Forward(servers) => self.ways(&servers),
            // A failure, unlike a denial, makes the client ask its next server.
            Answer::NotMine if self.upstreams.leaves(request.name()) => Vec::new(),
            Answer::NotMine => self.servers(),
            known => {
                if let Some(answer) = request.answer(known) {
                    self.reply(client, &request, answer, replies);
                }
                return;
            }
        };
        if servers.is_empty() || self.forwarded.len() >= MAX_FORWARDED {
            tracing::debug!(name = %request.name(), "no DNS server can be asked");
            let answer = request.fail();
            return self.reply(client, &request, answer, replies);
        }
        let peers = self.peers.clone();
        self.forwarded.spawn(
            async move {
                let whole = matches!(client, Client::Tcp(_));
                let answer = upstream::ask(&servers, &peers, &request, whole).await;
                (client, request, answer)
            }
            .in_current_span(),
        );
    }

    /// The servers for names that are of no tailnet.
    fn servers(&mut self) -> Vec<Way> {
        let servers = self.ways(&self.zone.servers());
        if !servers.is_empty() {
            return servers;
        }
        match self.upstreams.servers() {
            [] => self.ways(&self.zone.fallback_servers()),
            servers => servers.iter().copied().map(Way::Host).collect(),
        }
    }

    /// Those servers that can be asked.
    fn ways(&self, servers: &[SocketAddr]) -> Vec<Way> {
        let ways = servers.iter().filter_map(|server| self.zone.way(*server));
        ways.filter(|way| self.peers.is_open() || matches!(way, Way::Host(_)))
            .collect()
    }

    fn reply(
        &mut self,
        client: Client,
        request: &Request,
        answer: Vec<u8>,
        replies: &mut Vec<Vec<u8>>,
    ) {
        let answer = match client {
            Client::Udp { .. } => request.fit_udp(answer),
            Client::Tcp(_) => answer,
        };
        self.send(client, answer, replies);
    }

    fn send(&mut self, client: Client, answer: Vec<u8>, replies: &mut Vec<Vec<u8>>) {
        match client {
            Client::Udp { asked, from } => replies.extend(packet::udp(asked, from, &answer)),
            Client::Tcp(connection) => {
                if let Some(stack) = &mut self.stack {
                    stack.answer(connection, &answer, std::time::Instant::now());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::ErrorKind, time::Duration};

    use hickory_proto::{
        op::{Message, MessageType, ResponseCode},
        rr::{RData, Record, RecordType, rdata::A, rdata::TXT},
    };
    use tailnode_wire::tailcfg::DnsConfig;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, UdpSocket},
        time::timeout,
    };

    use super::{
        message::tests::query,
        zone::tests::{node, servers, zone},
        *,
    };
    use crate::packet::tests::icmp;

    const CLIENT: &str = "100.64.0.1:4000";
    const MAGIC: &str = "100.100.100.100:53";

    struct Container {
        resolver: Resolver,
        replies: mpsc::Receiver<Vec<u8>>,
    }

    impl Container {
        fn new(zone: Zone) -> Self {
            let (sender, replies) = mpsc::channel(64);
            let resolver = Resolver::new(zone, sender, Upstreams::host());
            Self { resolver, replies }
        }

        /// Asks by UDP.
        async fn ask(&mut self, server: &str, question: &[u8]) -> Message {
            let (client, server) = (CLIENT.parse().unwrap(), server.parse().unwrap());
            self.resolver
                .handle(&packet::udp(client, server, question).unwrap());
            let reply = self.reply().await;
            let reply = Packet::parse(&reply).unwrap();
            assert_eq!((reply.src(), reply.dst()), (server.ip(), client.ip()));
            assert_eq!(reply.transport(), Transport::Udp { src: 53, dst: 4000 });
            Message::from_vec(reply.payload()).unwrap()
        }

        async fn reply(&mut self) -> Vec<u8> {
            timeout(Duration::from_secs(60), self.replies.recv())
                .await
                .unwrap()
                .unwrap()
        }
    }

    /// A tailnet that has names of its own and the given servers for `example.org`.
    fn with_servers(addresses: &[SocketAddr]) -> Zone {
        let zone = Zone::default();
        let addresses: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        zone.set(
            &node(1, "me.t.net.", &["100.64.0.1"]),
            &[],
            &DnsConfig {
                proxied: true,
                routes: BTreeMap::from([("example.org".into(), Some(servers(&addresses)))]),
                ..DnsConfig::default()
            },
        );
        zone
    }

    /// Writes the answer to a query: an address, or a text of 3 KB if TXT is asked for.
    fn serve(query: &[u8], by_udp: bool) -> Vec<u8> {
        let query = Message::from_vec(query).unwrap();
        let question = query.queries[0].clone();
        let mut reply = Message::new(query.id, MessageType::Response, query.op_code);
        reply.add_query(question.clone());
        let data = match question.query_type {
            RecordType::TXT if by_udp => {
                reply.metadata.truncation = true;
                return reply.to_vec().unwrap();
            }
            RecordType::TXT => RData::TXT(TXT::new(vec!["x".repeat(250); 12])),
            _ => RData::A(A([192, 0, 2, 1].into())),
        };
        reply.add_answer(Record::from_rdata(question.name, 60, data));
        reply.to_vec().unwrap()
    }

    /// A name server on loopback, by UDP and TCP, which first sends forged answers by UDP.
    async fn name_server() -> SocketAddr {
        let (udp, tcp, address) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let address = udp.local_addr().unwrap();
            match TcpListener::bind(address).await {
                Ok(tcp) => break (udp, tcp, address),
                // A port that is free for UDP may be somebody's by TCP.
                Err(e) if e.kind() == ErrorKind::AddrInUse => {}
                Err(e) => panic!("binding {address}: {e}"),
            }
        };
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            loop {
                let (length, client) = udp.recv_from(&mut buffer).await.unwrap();
                let answer = serve(&buffer[..length], true);
                let mut forged = answer.clone();
                forged[0] ^= 0xff;
                for bytes in [&forged[..], &buffer[..length], b"junk", &answer] {
                    udp.send_to(bytes, client).await.unwrap();
                }
            }
        });
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let mut query = vec![0; stream.read_u16().await.unwrap().into()];
                stream.read_exact(&mut query).await.unwrap();
                let answer = serve(&query, false);
                stream.write_u16(answer.len() as u16).await.unwrap();
                stream.write_all(&answer).await.unwrap();
            }
        });
        address
    }

    /// An address where nobody listens: nobody serves tcpmux by UDP.
    const NOBODY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1);

    #[tokio::test]
    async fn names_of_the_tailnet_are_answered_at_any_address() {
        let mut container = Container::new(zone());
        let question = query(7, "web.", RecordType::A, None);
        for server in [MAGIC, "192.0.2.53:53"] {
            let reply = container.ask(server, &question).await;
            assert_eq!(reply.id, 7);
            assert_eq!(reply.answers[0].data, RData::A(A([100, 64, 0, 2].into())));
        }
        let sibling = Zone::default();
        sibling.set(
            &node(1, "mail.t2.net.", &["100.64.7.7"]),
            &[],
            &DnsConfig::default(),
        );
        container.resolver.set_siblings(vec![sibling]);
        let reply = container
            .ask(MAGIC, &query(8, "mail.t2.net.", RecordType::A, None))
            .await;
        assert_eq!(reply.answers[0].data, RData::A(A([100, 64, 7, 7].into())));
        let reply = container
            .ask(MAGIC, &[&question[..], b"x"].concat()[..20])
            .await;
        assert_eq!(reply.response_code, ResponseCode::FormErr);
    }

    #[tokio::test]
    async fn the_resolver_answers_pings() {
        let mut container = Container::new(zone());
        let (client, server) = ("100.64.0.1".parse().unwrap(), SERVICE_V4);
        container
            .resolver
            .handle(&icmp(client, server, 8, 7, b"ping"));
        let reply = container.reply().await;
        assert_eq!(Packet::parse(&reply).unwrap().payload(), b"ping");
    }

    #[tokio::test]
    async fn other_servers_are_asked() {
        // One that is down and one that is up.
        let mut container = Container::new(with_servers(&[NOBODY, name_server().await]));
        let reply = container
            .ask(MAGIC, &query(7, "www.Example.org.", RecordType::A, None))
            .await;
        assert_eq!((reply.id, reply.response_code), (7, ResponseCode::NoError));
        assert_eq!(reply.answers[0].data, RData::A(A([192, 0, 2, 1].into())));
        // What is too long for UDP says so.
        let reply = container
            .ask(MAGIC, &query(8, "www.example.org.", RecordType::TXT, None))
            .await;
        assert!(reply.truncation);
    }

    #[tokio::test]
    async fn a_peer_is_asked_through_the_tailnet() {
        let zone = with_servers(&["100.64.0.9:53".parse().unwrap()]);
        zone.update(9, Some(&node(9, "dns.t.net.", &["100.64.0.9"])));
        let mut container = Container::new(zone);
        let (client, magic) = (CLIENT.parse().unwrap(), MAGIC.parse().unwrap());
        let question = query(7, "www.example.org.", RecordType::A, None);
        let question = packet::udp(client, magic, &question).unwrap();

        container.resolver.handle(&question);
        let refused = container.reply().await;
        let refused = Message::from_vec(Packet::parse(&refused).unwrap().payload()).unwrap();
        assert_eq!(refused.response_code, ResponseCode::ServFail, "no way yet");

        let (sender, mut questions) = mpsc::channel(4);
        container.resolver.ask_peers(sender);
        container.resolver.handle(&question);
        let asked = timeout(Duration::from_secs(60), questions.recv())
            .await
            .unwrap()
            .unwrap();
        let asked = Packet::parse(&asked).unwrap();
        let Transport::Udp { src: port, dst: 53 } = asked.transport() else {
            panic!("{asked:?}");
        };
        let (us, server) = (
            SocketAddr::new(asked.src(), port),
            SocketAddr::new(asked.dst(), 53),
        );
        assert_eq!(
            (us.ip(), server),
            (client.ip(), "100.64.0.9:53".parse().unwrap())
        );
        let answer = serve(asked.payload(), true);
        let forger = "100.64.0.8:53".parse().unwrap();
        assert!(
            !container
                .resolver
                .answers()
                .take(&packet::udp(forger, us, &answer).unwrap())
        );
        assert!(
            !container
                .resolver
                .answers()
                .take(&packet::udp(server, client, &answer).unwrap())
        );
        assert!(
            container
                .resolver
                .answers()
                .take(&packet::udp(server, us, b"junk").unwrap())
        );
        assert!(
            container
                .resolver
                .answers()
                .take(&packet::udp(server, us, &answer).unwrap())
        );
        let reply = container.reply().await;
        let reply = Message::from_vec(Packet::parse(&reply).unwrap().payload()).unwrap();
        assert_eq!((reply.id, reply.answers.len()), (7, 1));
        assert!(
            !container
                .resolver
                .answers()
                .take(&packet::udp(server, us, &answer).unwrap())
        );
    }

    #[tokio::test]
    async fn without_servers_there_is_an_answer_at_once() {
        for servers in [vec![], vec![NOBODY]] {
            let mut zone = with_servers(&servers);
            if servers.is_empty() {
                zone = with_servers(&["100.100.100.100:53".parse().unwrap()]);
            }
            let mut container = Container::new(zone);
            let reply = container
                .ask(MAGIC, &query(7, "example.org.", RecordType::A, None))
                .await;
            assert_eq!((reply.id, reply.response_code), (7, ResponseCode::ServFail));
        }
    }

    #[tokio::test]
    async fn long_answers_come_by_tcp() {
        let mut container = Container::new(with_servers(&[name_server().await]));
        let mut kernel = tcp::tests::Container::new();
        let client = kernel.connect("192.0.2.53:53".parse().unwrap(), 4000);
        let mut sent = kernel.exchange(None);
        let mut asked = false;
        let answer = loop {
            for packet in std::mem::take(&mut sent) {
                container.resolver.handle(&packet);
            }
            let reply = container.reply().await;
            sent.extend(kernel.exchange(Some(reply)));
            if !asked && kernel.socket(client).may_send() {
                asked = true;
                kernel.ask(client, &query(1, "www.example.org.", RecordType::TXT, None));
                kernel.ask(client, &query(2, "me.", RecordType::A, None));
                sent.extend(kernel.exchange(None));
            }
            match kernel
                .answer(client)
                .map(|answer| Message::from_vec(&answer).unwrap())
            {
                // What is known here need not wait for the question before it.
                Some(answer) if answer.id == 2 => assert_eq!(answer.answers.len(), 1),
                Some(answer) => break answer,
                None => {}
            }
        };
        assert_eq!(answer.id, 1);
        assert!(!answer.truncation);
        assert!(matches!(&answer.answers[0].data, RData::TXT(text) if text.txt_data.len() == 12));
    }

    #[tokio::test]
    async fn the_task_ends_with_the_resolver() {
        let Container {
            resolver,
            mut replies,
        } = Container::new(zone());
        drop(resolver);
        assert_eq!(replies.recv().await, None);
    }
}
