//! Nodes join a running server over loopback: Noise, HTTP/2, map streams, DERP and STUN for real.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "clippy takes the fixtures of an integration test for ordinary code"
)]

use std::{fs, net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode, body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tailnode_control_server::{
    Config, DERP_REGION, KeySpec, Server, TlsFiles,
    admin::{self, Answer},
};
use tailnode_wire::{
    CAPABILITY_VERSION,
    derp::{self, ClientInfo, Frame, PeerGoneReason, ServerInfo},
    disco,
    keys::{DiscoPrivateKey, DiscoPublicKey, MachineKeyPair, NodeKeyPair, NodePublicKey},
    noise, stun,
    tailcfg::{
        Hostinfo, MapRequest, MapResponse, NetInfo, OverTlsPublicKeyResponse, RegisterRequest,
        RegisterResponse, RegisterResponseAuth,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
};
use tokio_util::codec::Framed;

/// No step takes a tenth of it; a hang is to fail, not to block the suite.
const PATIENCE: Duration = Duration::from_secs(60);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what)
        .await
        .expect("it takes too long")
}

struct Fixture {
    server: Server,
    dir: tempfile::TempDir,
}

async fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Config::new(dir.path())).await.unwrap();
    Fixture { server, dir }
}

impl Fixture {
    fn addr(&self) -> SocketAddr {
        self.server.url().socket_addrs(|| None).unwrap()[0]
    }

    fn key(&self, spec: KeySpec) -> String {
        self.server.create_key(spec).unwrap()
    }

    /// A node that has registered under `hostname`.
    async fn join(&self, hostname: &str, spec: KeySpec) -> Client {
        let mut client = Client::connect(self.addr()).await;
        let answer = client.register(hostname, &self.key(spec)).await;
        assert_eq!(answer.error, "");
        assert!(answer.machine_authorized);
        client
    }
}

/// One node's Noise channel to the server.
struct Client {
    addr: SocketAddr,
    machine: MachineKeyPair,
    node: NodeKeyPair,
    disco: DiscoPublicKey,
    http: http2::SendRequest<Full<Bytes>>,
}

/// Sends `request` and returns the connection after the answer's head.
async fn upgrade(addr: SocketAddr, request: String) -> (TcpStream, String) {
    let mut io = TcpStream::connect(addr).await.unwrap();
    io.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(io.read_u8().await.unwrap());
    }
    (io, String::from_utf8(head).unwrap())
}

async fn get(addr: SocketAddr, path: &str, header: &str) -> String {
    let mut io = TcpStream::connect(addr).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n");
    io.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    io.read_to_string(&mut answer).await.unwrap();
    answer
}

impl Client {
    async fn connect(addr: SocketAddr) -> Self {
        let answer = get(addr, "/key?v=113", "").await;
        let body = answer.split("\r\n\r\n").nth(1).unwrap();
        let control: OverTlsPublicKeyResponse = serde_json::from_str(body).unwrap();
        let machine = MachineKeyPair::random();
        let version = u16::try_from(CAPABILITY_VERSION).unwrap();
        let (pending, handshake) = noise::initiate(&machine, &control.public_key, version);
        let (io, head) = upgrade(
            addr,
            format!(
                "POST /ts2021 HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: {}\r\n\
                 {}: {handshake}\r\nContent-Length: 0\r\n\r\n",
                noise::UPGRADE,
                noise::HANDSHAKE_HEADER
            ),
        )
        .await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        let channel = pending.complete(io).await.unwrap();
        let (http, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(channel))
            .await
            .unwrap();
        tokio::spawn(connection);
        let (node, disco) = (
            NodeKeyPair::random(),
            DiscoPrivateKey::random().public_key(),
        );
        Self {
            addr,
            machine,
            node,
            disco,
            http,
        }
    }

    async fn post(&mut self, path: &str, body: Vec<u8>) -> hyper::Response<Incoming> {
        let request = Request::post(format!("https://x{path}"))
            .body(Full::from(body))
            .unwrap();
        soon(self.http.send_request(request)).await.unwrap()
    }

    fn registration(&self, hostname: &str) -> RegisterRequest {
        RegisterRequest {
            version: CAPABILITY_VERSION,
            node_key: self.node.public,
            old_node_key: None,
            auth: None,
            node_key_signature: None,
            expiry: None,
            followup: String::new(),
            hostinfo: Some(Hostinfo {
                hostname: hostname.to_owned(),
                ..Hostinfo::default()
            }),
            ephemeral: false,
        }
    }

    async fn send(&mut self, request: &RegisterRequest) -> RegisterResponse {
        let response = self
            .post("/machine/register", serde_json::to_vec(request).unwrap())
            .await;
        assert_eq!(response.status(), StatusCode::OK);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        serde_json::from_slice(&body).unwrap()
    }

    async fn register(&mut self, hostname: &str, key: &str) -> RegisterResponse {
        let auth = Some(RegisterResponseAuth {
            auth_key: key.to_owned(),
        });
        let request = RegisterRequest {
            auth,
            ..self.registration(hostname)
        };
        self.send(&request).await
    }

    fn map_request(&self) -> MapRequest {
        MapRequest {
            version: CAPABILITY_VERSION,
            compress: String::new(),
            keep_alive: true,
            node_key: self.node.public,
            disco_key: self.disco,
            stream: false,
            hostinfo: None,
            map_session_handle: String::new(),
            map_session_seq: 0,
            endpoints: Vec::new(),
            endpoint_types: Vec::new(),
            omit_peers: true,
            read_only: false,
        }
    }

    async fn map(&mut self, request: &MapRequest) -> hyper::Response<Incoming> {
        self.post("/machine/map", serde_json::to_vec(request).unwrap())
            .await
    }

    async fn stream(&mut self, compress: &str) -> Stream {
        let request = MapRequest {
            stream: true,
            omit_peers: false,
            compress: compress.to_owned(),
            ..self.map_request()
        };
        let response = self.map(&request).await;
        assert_eq!(response.status(), StatusCode::OK);
        Stream {
            body: response.into_body(),
            buffer: BytesMut::new(),
            zstd: !compress.is_empty(),
        }
    }

    async fn update(&mut self, endpoint: &str) {
        let net_info = NetInfo {
            preferred_derp: DERP_REGION,
            ..NetInfo::default()
        };
        let request = MapRequest {
            endpoints: vec![endpoint.parse().unwrap()],
            hostinfo: Some(Hostinfo {
                hostname: "a".to_owned(),
                net_info: Some(net_info),
                ..Hostinfo::default()
            }),
            ..self.map_request()
        };
        assert_eq!(self.map(&request).await.status(), StatusCode::OK);
    }

    async fn relay(&self) -> Framed<TcpStream, derp::Codec> {
        let request =
            "GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: DERP\r\n\r\n";
        let (io, head) = upgrade(self.addr, request.to_owned()).await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        greet(Framed::new(io, derp::Codec), &self.node).await
    }
}

/// Speaks the client's part of a DERP greeting.
async fn greet(
    mut relay: Framed<TcpStream, derp::Codec>,
    node: &NodeKeyPair,
) -> Framed<TcpStream, derp::Codec> {
    let Frame::ServerKey(server) = hear(&mut relay).await else {
        panic!("no server key")
    };
    relay
        .send(ClientInfo::default().seal(node, &server).unwrap())
        .await
        .unwrap();
    let Frame::ServerInfo { sealed } = hear(&mut relay).await else {
        panic!("no server info")
    };
    let info = ServerInfo::open(&sealed, &server, &node.private).unwrap();
    assert_eq!(info.version, derp::VERSION);
    relay
}

async fn hear(relay: &mut Framed<TcpStream, derp::Codec>) -> Frame {
    soon(relay.next())
        .await
        .expect("the relay has hung up")
        .unwrap()
}

/// A map stream.
struct Stream {
    body: Incoming,
    buffer: BytesMut,
    zstd: bool,
}

impl Stream {
    /// The next message; `None`: the server has ended the stream.
    async fn next(&mut self) -> Option<MapResponse> {
        loop {
            if let Some(len) = self
                .buffer
                .first_chunk()
                .map(|len| u32::from_le_bytes(*len))
                && self.buffer.len() >= 4 + len as usize
            {
                self.buffer.advance(4);
                let mut json = self.buffer.split_to(len as usize).to_vec();
                if self.zstd {
                    json = zstd::bulk::decompress(&json, 1 << 20).unwrap();
                }
                return Some(serde_json::from_slice(&json).unwrap());
            }
            let frame = soon(self.body.frame()).await?.unwrap();
            self.buffer.extend_from_slice(&frame.into_data().unwrap());
        }
    }

    /// The first message for which `pick` finds something.
    async fn until<T>(&mut self, pick: impl Fn(&MapResponse) -> Option<T>) -> T {
        soon(async {
            loop {
                let message = self.next().await.expect("the stream has ended");
                if let Some(found) = pick(&message) {
                    return found;
                }
            }
        })
        .await
    }
}

fn reusable() -> KeySpec {
    KeySpec {
        reusable: true,
        ..KeySpec::default()
    }
}

#[tokio::test]
async fn two_nodes_see_each_other_come_move_and_go() {
    let fixture = fixture().await;
    let mut a = fixture.join("a", reusable()).await;
    let mut map_a = a.stream("zstd").await;
    let full = map_a.next().await.unwrap();
    let node = full.node.unwrap();
    assert_eq!(node.name, "a.tail.internal.");
    let tailnets: ipnet::IpNet = "100.64.0.0/10".parse().unwrap();
    assert!(tailnets.contains(&node.addresses[0]) && node.addresses[0].prefix_len() == 32);
    assert_eq!(node.machine, Some(a.machine.public));
    assert_eq!(full.peers, Some(Vec::new()));
    let dns = full.dns_config.unwrap();
    assert!(dns.proxied && dns.domains == ["tail.internal"]);
    assert_eq!(dns.routes["tail.internal"], Some(Vec::new()));
    let derp = &full.derp_map.unwrap().regions[&DERP_REGION].nodes[0];
    assert_eq!(derp.derp_port, fixture.addr().port());
    assert_eq!(
        derp.stun_port,
        i32::from(fixture.server.stun().unwrap().port())
    );
    assert!(full.debug.unwrap().disable_log_tail);
    assert!(
        !full.packet_filters.unwrap()["base"]
            .as_ref()
            .unwrap()
            .is_empty()
    );

    let mut b = fixture.join("b", reusable()).await;
    let added = map_a.until(|m| m.peers_changed.first().cloned()).await;
    assert_eq!(
        (added.name.as_str(), added.key),
        ("b.tail.internal.", b.node.public)
    );
    let mut map_b = b.stream("").await;
    let peers = map_b.next().await.unwrap().peers.unwrap();
    assert_eq!(peers[0].key, a.node.public);
    assert_eq!(peers[0].online, Some(true));
    map_a
        .until(|m| {
            m.peers_changed_patch
                .iter()
                .find(|p| p.online == Some(true))
                .cloned()
        })
        .await;

    a.update("192.0.2.1:41641").await;
    let patch = map_b
        .until(|m| {
            m.peers_changed_patch
                .iter()
                .find(|p| p.endpoints.is_some())
                .cloned()
        })
        .await;
    assert_eq!(patch.endpoints.unwrap()[0].to_string(), "192.0.2.1:41641");
    assert_eq!(patch.derp_region, Some(DERP_REGION));

    drop((map_b, b));
    let patch = map_a
        .until(|m| {
            m.peers_changed_patch
                .iter()
                .find(|p| p.online.is_some())
                .cloned()
        })
        .await;
    assert_eq!(patch.online, Some(false));
    assert!(patch.last_seen.is_some());
    fixture.server.delete_node(2).unwrap();
    assert_eq!(map_a.until(|m| m.peers_removed.first().copied()).await, 2);
    fixture.server.shutdown().await;
}

#[tokio::test]
async fn an_ephemeral_node_is_removed_when_it_is_gone() {
    let fixture = fixture().await;
    let mut a = fixture.join("a", reusable()).await;
    let mut map_a = a.stream("").await;
    let mut b = fixture
        .join(
            "b",
            KeySpec {
                ephemeral: true,
                ..KeySpec::default()
            },
        )
        .await;
    let mut map_b = b.stream("").await;
    map_b.next().await.unwrap();
    map_a.until(|m| m.peers_changed.first().map(|_| ())).await;
    drop((map_b, b));
    assert_eq!(map_a.until(|m| m.peers_removed.first().copied()).await, 2);
    assert_eq!(fixture.server.nodes().len(), 1);
}

#[tokio::test]
async fn a_newer_stream_ends_the_older() {
    let fixture = fixture().await;
    let mut a = fixture.join("a", reusable()).await;
    let mut older = a.stream("").await;
    older.next().await.unwrap();
    let mut newer = a.stream("").await;
    newer.next().await.unwrap();
    while older.next().await.is_some() {}
    assert!(fixture.server.nodes()[0].online);
}

#[tokio::test]
async fn a_policy_takes_effect_at_once() {
    let fixture = fixture().await;
    let tag = |tag: &str| KeySpec {
        tags: [tag.to_owned()].into(),
        ..KeySpec::default()
    };
    let mut web = fixture.join("web", tag("tag:web")).await;
    let _db = fixture.join("db", tag("tag:db")).await;
    let mut map = web.stream("").await;
    let full = map.next().await.unwrap();
    let (me, peers) = (full.node.unwrap(), full.peers.unwrap());
    assert_eq!(peers.len(), 1);
    fixture.server.set_policy("{}".parse().unwrap());
    let closed = map.next().await.unwrap();
    assert_eq!(closed.peers_removed, [2]);
    assert_eq!(closed.packet_filters.unwrap()["base"], Some(Vec::new()));

    let text = r#"{"acls": [{"action": "accept", "src": ["tag:db"], "dst": ["tag:web:80"]}]}"#;
    let set = admin::Request::SetPolicy {
        text: text.to_owned(),
    };
    admin::ask(fixture.dir.path(), set).await.unwrap();
    let open = map.next().await.unwrap();
    assert_eq!(open.peers_changed[0].id, 2);
    let filter = open.packet_filters.unwrap()["base"].clone().unwrap();
    let sources: Vec<String> = peers[0]
        .addresses
        .iter()
        .map(|net| net.addr().to_string())
        .collect();
    assert_eq!(filter[0].src_ips, sources);
    assert_eq!(
        filter[0].dst_ports[0].ip,
        me.addresses[0].addr().to_string()
    );
    assert_eq!(filter[0].dst_ports[0].ports.first, 80);
}

#[tokio::test]
async fn a_node_without_a_key_waits_for_approval() {
    let fixture = fixture().await;
    let mut a = Client::connect(fixture.addr()).await;
    let ask = a.registration("laptop<b>");
    let url = a.send(&ask).await.auth_url;
    let (_, path) = url.rsplit_once("/register/").unwrap();
    let page = get(fixture.addr(), &format!("/register/{path}"), "").await;
    assert!(
        page.contains(&format!("tailnode-control node approve {path}")),
        "{page}"
    );
    assert!(page.contains("laptop&lt;b&gt;"), "{page}");

    let followup = RegisterRequest {
        followup: url.clone(),
        ..ask
    };
    let approve = admin::Request::ApproveNode {
        id: path.to_owned(),
        user: None,
    };
    let (answer, approved) =
        tokio::join!(a.send(&followup), admin::ask(fixture.dir.path(), approve));
    assert!(matches!(approved, Ok(Answer::Node(1))));
    assert!(answer.machine_authorized);
    assert_eq!(answer.login.login_name, "user@tail.internal");
}

#[tokio::test]
async fn strangers_get_nothing() {
    let fixture = fixture().await;
    let mut a = fixture.join("a", reusable()).await;
    let mut stranger = Client::connect(fixture.addr()).await;
    let stolen = MapRequest {
        node_key: a.node.public,
        ..stranger.map_request()
    };
    for request in [&stolen, &stranger.map_request()] {
        assert_eq!(stranger.map(request).await.status(), StatusCode::NOT_FOUND);
    }
    assert_eq!(
        a.post("/machine/set-dns", Vec::new()).await.status(),
        StatusCode::NOT_IMPLEMENTED
    );
    assert_eq!(
        a.post("/machine/map", b"{".to_vec()).await.status(),
        StatusCode::BAD_REQUEST
    );
    let refused = stranger.register("b", "tnkey-0-0").await;
    assert!(
        refused.error.contains("tailnode-control key create"),
        "{}",
        refused.error
    );
}

#[tokio::test]
async fn the_relay_passes_packets_between_members() {
    let fixture = fixture().await;
    let a = fixture.join("a", reusable()).await;
    let b = fixture.join("b", reusable()).await;
    let (mut from, mut to) = (a.relay().await, b.relay().await);
    let payload = Bytes::from(vec![7; derp::MAX_PACKET]);
    let packet = Frame::SendPacket {
        dst: b.node.public,
        payload: payload.clone(),
    };
    from.send(packet).await.unwrap();
    assert_eq!(
        hear(&mut to).await,
        Frame::RecvPacket {
            src: a.node.public,
            payload
        }
    );
    from.send(Frame::Ping(*b"12345678")).await.unwrap();
    assert_eq!(hear(&mut from).await, Frame::Pong(*b"12345678"));

    // A search for a path to someone who is not here ends early.
    let nobody = NodePublicKey::random();
    let search = [&disco::MAGIC[..], &[1; 80]].concat().into();
    from.send(Frame::SendPacket {
        dst: nobody,
        payload: search,
    })
    .await
    .unwrap();
    let gone = Frame::PeerGone {
        key: nobody,
        reason: PeerGoneReason::NotHere,
    };
    assert_eq!(hear(&mut from).await, gone);

    drop(from);
    let gone = Frame::PeerGone {
        key: a.node.public,
        reason: PeerGoneReason::Disconnected,
    };
    assert_eq!(hear(&mut to).await, gone);
}

#[tokio::test]
async fn the_relay_can_start_without_an_http_answer() {
    let fixture = fixture().await;
    let a = fixture.join("a", reusable()).await;
    let mut io = TcpStream::connect(fixture.addr()).await.unwrap();
    io.write_all(b"GET /derp HTTP/1.1\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n")
        .await
        .unwrap();
    greet(Framed::new(io, derp::Codec), &a.node).await;
}

#[tokio::test]
async fn the_relay_serves_no_strangers() {
    let fixture = fixture().await;
    let mut io = TcpStream::connect(fixture.addr()).await.unwrap();
    io.write_all(b"GET /derp HTTP/1.1\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n")
        .await
        .unwrap();
    let mut relay = Framed::new(io, derp::Codec);
    let Frame::ServerKey(server) = hear(&mut relay).await else {
        panic!("no server key")
    };
    let info = ClientInfo::default()
        .seal(&NodeKeyPair::random(), &server)
        .unwrap();
    relay.send(info).await.unwrap();
    assert!(soon(relay.next()).await.is_none());
}

#[tokio::test]
async fn stun_tells_where_we_are() {
    let fixture = fixture().await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket
        .send_to(b"not stun", fixture.server.stun().unwrap())
        .await
        .unwrap();
    socket
        .send_to(&stun::request(&[7; 12]), fixture.server.stun().unwrap())
        .await
        .unwrap();
    let mut answer = [0; 100];
    let len = soon(socket.recv(&mut answer)).await.unwrap();
    let expected = ([7; 12], socket.local_addr().unwrap());
    assert_eq!(stun::parse_response(&answer[..len]), Ok(expected));
}

#[tokio::test]
async fn plain_http_answers_what_nodes_ask() {
    let fixture = fixture().await;
    let addr = fixture.addr();
    assert!(
        get(addr, "/derp/latency-check", "")
            .await
            .starts_with("HTTP/1.1 200 ")
    );
    assert!(get(addr, "/derp", "").await.starts_with("HTTP/1.1 426 "));
    assert!(get(addr, "/key", "").await.starts_with("HTTP/1.1 400 "));
    let portal = get(addr, "/generate_204", "X-Tailscale-Challenge: ts_1.2\r\n").await;
    assert!(
        portal.starts_with("HTTP/1.1 204 ") && portal.contains("response ts_1.2"),
        "{portal}"
    );
}

#[tokio::test]
async fn a_key_can_be_made_with_and_without_a_running_server() {
    let fixture = fixture().await;
    let dir = fixture.dir.path();
    let create = || admin::Request::CreateKey(reusable());
    let Answer::Key(first) = admin::ask(dir, create()).await.unwrap() else {
        panic!("no key");
    };
    let mut a = Client::connect(fixture.addr()).await;
    assert_eq!(a.register("a", &first).await.error, "");
    fixture.server.shutdown().await;

    let Answer::Key(second) = admin::ask(dir, create()).await.unwrap() else {
        panic!("no key");
    };
    let server = Server::start(Config::new(dir)).await.unwrap();
    let mut b = Client::connect(server.url().socket_addrs(|| None).unwrap()[0]).await;
    assert_eq!(b.register("b", &second).await.error, "");
    assert_eq!(server.nodes().len(), 2);
    let delete = admin::Request::DeleteNode { id: 7 };
    let refused = admin::ask(dir, delete).await.unwrap_err();
    assert!(refused.to_string().contains("no node 7"), "{refused}");
}

#[tokio::test]
async fn https_is_served_where_there_is_a_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let files = TlsFiles {
        cert: dir.path().join("server.crt"),
        key: dir.path().join("server.key"),
    };
    fs::write(&files.cert, made.cert.pem()).unwrap();
    fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    let config = |files: &TlsFiles| Config {
        tls: Some(files.clone()),
        ..Config::new(dir.path())
    };
    let server = Server::start(config(&files)).await.unwrap();
    assert_eq!(server.url().scheme(), "https");

    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = TcpStream::connect(server.url().socket_addrs(|| None).unwrap()[0]);
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    let name = "127.0.0.1".try_into().unwrap();
    let mut tls = connector.connect(name, tcp.await.unwrap()).await.unwrap();
    let request = b"GET /key?v=113 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    tls.write_all(request).await.unwrap();
    let mut answer = String::new();
    soon(tls.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.contains("publicKey"), "{answer}");
    server.shutdown().await;

    // A key of another certificate, and files that hold none of either.
    let other = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    fs::write(&files.key, other.signing_key.serialize_pem()).unwrap();
    let error = Server::start(config(&files)).await.err().unwrap();
    assert!(error.to_string().contains("server.key"), "{error}");
    fs::write(&files.cert, "").unwrap();
    let error = Server::start(config(&files)).await.err().unwrap();
    assert!(error.to_string().contains("no certificate"), "{error}");
    let plain = Config {
        url: Some("http://192.0.2.1".parse().unwrap()),
        ..config(&TlsFiles {
            cert: dir.path().join("again.crt"),
            key: dir.path().join("again.key"),
        })
    };
    fs::write(dir.path().join("again.crt"), made.cert.pem()).unwrap();
    fs::write(
        dir.path().join("again.key"),
        made.signing_key.serialize_pem(),
    )
    .unwrap();
    let error = Server::start(plain).await.err().unwrap();
    assert!(error.to_string().contains("--url https://"), "{error}");
}

#[tokio::test]
async fn further_relays_are_told_to_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("derp.json");
    let config = || Config {
        derp_map: Some(path.clone()),
        ..Config::new(dir.path())
    };
    let text = r#"{
        // In the lab.
        "Regions": {"901": {"RegionID": 901, "RegionCode": "lab", "Nodes": [
            {"Name": "901a", "RegionID": 901, "HostName": "derp.example.com"},
        ]}},
    }"#;
    for (omit, regions) in [(false, vec![DERP_REGION, 901]), (true, vec![901])] {
        let omit = format!("{{\"OmitDefaultRegions\": {omit},");
        fs::write(&path, text.replacen('{', &omit, 1)).unwrap();
        let server = Server::start(config()).await.unwrap();
        let fixture = Fixture {
            server,
            dir: tempfile::tempdir().unwrap(),
        };
        let mut node = fixture.join("a", KeySpec::default()).await;
        let map = node
            .stream("")
            .await
            .next()
            .await
            .unwrap()
            .derp_map
            .unwrap();
        assert_eq!(map.regions.keys().copied().collect::<Vec<_>>(), regions);
        assert_eq!(map.regions[&901].nodes[0].host_name, "derp.example.com");
        fixture.server.shutdown().await;
    }
    for (text, words) in [
        ("{}", "no Regions"),
        ("nonsense", "line 1"),
        (
            r#"{"Regions": {"901": {"RegionID": 902}}}"#,
            "another number",
        ),
        (r#"{"Regions": {"901": {"RegionID": 901}}}"#, "no Nodes"),
        (
            r#"{"Regions": {"901": {"RegionID": 901, "Nodes": [{"Name": "a"}]}}}"#,
            "without HostName",
        ),
    ] {
        fs::write(&path, text).unwrap();
        let error = Server::start(config()).await.err().unwrap().to_string();
        assert!(
            error.contains("derp.json") && error.contains(words),
            "{error}"
        );
    }
}
