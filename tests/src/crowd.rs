use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper::{body::Bytes, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tailnode_wire::{
    CAPABILITY_VERSION,
    keys::{DiscoPublicKey, MachineKeyPair, MachinePublicKey, NodePublicKey},
    noise,
    tailcfg::OverTlsPublicKeyResponse,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net,
};

use crate::{Namespace, Underlay};

/// How many of them speak at a time.
const AT_A_TIME: usize = 16;

/// Nodes that have joined a tailnet and are not there: they fill its maps.
pub struct Crowd {
    server: SocketAddr,
    control: MachinePublicKey,
    members: Vec<Member>,
    moves: u8,
}

struct Member {
    name: String,
    machine: MachineKeyPair,
    node: NodePublicKey,
    disco: DiscoPublicKey,
}

impl Crowd {
    /// So many nodes join by one key at the server on the router's `port`.
    pub fn join(from: &Namespace, port: u16, key: &str, count: usize) -> Crowd {
        let server = SocketAddr::from((Underlay::ROUTER, port));
        let control = from.run(|| public_key(server));
        let member = |number| Member {
            name: format!("crowd-{number}"),
            machine: MachineKeyPair::random(),
            node: NodePublicKey::random(),
            disco: DiscoPublicKey::random(),
        };
        let mut crowd = Crowd {
            server,
            control: control.expect("ask for the server's key"),
            members: (0..count).map(member).collect(),
            moves: 0,
        };
        let auth = json!({ "AuthKey": key });
        crowd.each(from, "/machine/register", |member| {
            json!({
                "Version": CAPABILITY_VERSION, "NodeKey": member.node, "Auth": auth,
                "Hostinfo": { "Hostname": member.name },
            })
        });
        crowd.move_house(from);
        crowd
    }

    /// All tell of a new address.
    pub fn move_house(&mut self, from: &Namespace) {
        self.moves += 1;
        let port = 10_000 + u16::from(self.moves);
        self.each(from, "/machine/map", |member| {
            json!({
                "Version": CAPABILITY_VERSION, "NodeKey": member.node, "DiscoKey": member.disco,
                "Endpoints": [format!("192.0.2.1:{port}")], "EndpointTypes": [1],
                "Hostinfo": { "Hostname": member.name }, "OmitPeers": true,
            })
        });
    }

    /// All but so many log out.
    pub fn shrink_to(&mut self, from: &Namespace, count: usize) {
        let staying = self.members.drain(..count).collect();
        self.each(from, "/machine/register", |member| {
            json!({
                "Version": CAPABILITY_VERSION, "NodeKey": member.node,
                "Expiry": "1970-01-01T00:02:03Z", "Hostinfo": { "Hostname": member.name },
            })
        });
        self.members = staying;
    }

    /// Every member sends its request.
    fn each(&self, from: &Namespace, path: &str, request: impl Fn(&Member) -> Value + Sync) {
        let all = || {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            runtime.enable_all().build()?.block_on(async {
                let sent = stream::iter(&self.members)
                    .map(|member| self.send(member, path, request(member)))
                    .buffer_unordered(AT_A_TIME);
                sent.try_collect::<()>().await
            })
        };
        from.run(all)
            .unwrap_or_else(|error| panic!("the crowd's {path}: {error}"));
    }

    async fn send(&self, member: &Member, path: &str, request: Value) -> io::Result<()> {
        let version = CAPABILITY_VERSION as u16;
        let (pending, handshake) = noise::initiate(&member.machine, &self.control, version);
        let mut stream = net::TcpStream::connect(self.server).await?;
        let upgrade = format!(
            "POST /ts2021 HTTP/1.1\r\nHost: {}\r\nConnection: upgrade\r\nUpgrade: {}\r\n{}: {handshake}\r\n\r\n",
            self.server,
            noise::UPGRADE,
            noise::HANDSHAKE_HEADER,
        );
        stream.write_all(upgrade.as_bytes()).await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        let channel = pending.complete(stream).await.map_err(io::Error::other)?;
        let (mut sender, driver) = http2::handshake(TokioExecutor::new(), TokioIo::new(channel))
            .await
            .map_err(io::Error::other)?;
        let driver = tokio::spawn(driver);
        let request = Request::post(format!("https://{}{path}", self.server))
            .body(Full::<Bytes>::from(request.to_string()))
            .map_err(io::Error::other)?;
        let answer = sender.send_request(request).await;
        let answer = answer.map_err(io::Error::other)?;
        let status = answer.status();
        let body = answer.into_body().collect().await;
        let body = body.map_err(io::Error::other)?.to_bytes();
        driver.abort();
        let refusal = serde_json::from_slice(&body).unwrap_or(Value::Null)["Error"].clone();
        let refusal = refusal.as_str().unwrap_or_default();
        if status.is_success() && refusal.is_empty() {
            Ok(())
        } else {
            let body = String::from_utf8_lossy(&body);
            Err(io::Error::other(format!("{status}: {body}")))
        }
    }
}

fn public_key(server: SocketAddr) -> io::Result<MachinePublicKey> {
    let mut stream = TcpStream::connect(server)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(
        stream,
        "GET /key?v={CAPABILITY_VERSION} HTTP/1.0\r\nHost: {server}\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body);
    let answer: OverTlsPublicKeyResponse = serde_json::from_str(body.unwrap_or_default())?;
    Ok(answer.public_key)
}
