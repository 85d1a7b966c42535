//! DERP: the relay that carries packets between nodes by their keys (derp/derp.go, version 2).
//!
//! A frame is its type, a big-endian length of 4 bytes, and the body. The server greets with its
//! key, the client names itself in a sealed box, the server answers with another; then packets go
//! both ways.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use crypto_box::{
    PublicKey, SalsaBox,
    aead::{Aead, AeadCore, OsRng},
};
use serde::{Deserialize, Serialize};
use tokio_util::codec::{Decoder, Encoder};
use ts_keys::{DerpServerPublicKey, ExportableKey, NodeKeyPair, NodePrivateKey, NodePublicKey};

/// The protocol's name in the HTTP upgrade.
pub const UPGRADE: &str = "DERP";
/// With the value `1`, the client wants no HTTP answer: DERP begins at once.
pub const FAST_START_HEADER: &str = "Derp-Fast-Start";
/// The version that both sides speak: packets carry the sender's key.
pub const VERSION: u32 = 2;
/// Largest packet that the relay carries, in bytes.
pub const MAX_PACKET: usize = 64 << 10;
/// The server sends something at least this often; twice as long without is a dead connection.
pub const KEEP_ALIVE: Duration = Duration::from_secs(60);

const MAGIC: &[u8; 8] = "DERP🔑".as_bytes().first_chunk().unwrap();
/// Type and length.
const HEADER: usize = 1 + 4;
const KEY: usize = 32;
const NONCE: usize = 24;
/// Poly1305's tag.
const TAG: usize = 16;
const MAX_INFO: usize = KEY + NONCE + TAG + (1 << 20);
const MAX_FRAME: usize = 2 * KEY + MAX_PACKET;

mod kind {
    pub const SERVER_KEY: u8 = 0x01;
    pub const CLIENT_INFO: u8 = 0x02;
    pub const SERVER_INFO: u8 = 0x03;
    pub const SEND_PACKET: u8 = 0x04;
    pub const RECV_PACKET: u8 = 0x05;
    pub const KEEP_ALIVE: u8 = 0x06;
    pub const NOTE_PREFERRED: u8 = 0x07;
    pub const PEER_GONE: u8 = 0x08;
    pub const PEER_PRESENT: u8 = 0x09;
    pub const FORWARD_PACKET: u8 = 0x0a;
    pub const PING: u8 = 0x12;
    pub const PONG: u8 = 0x13;
    pub const HEALTH: u8 = 0x14;
    pub const RESTARTING: u8 = 0x15;
}

/// Why a frame was refused; the connection is of no use after it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Too long for its type.
    #[error("DERP frame of type {kind:#04x} has {len} bytes, which is too long")]
    Long {
        /// The frame's type.
        kind: u8,
        /// Its body's length.
        len: usize,
    },
    /// Too short for its type.
    #[error("DERP frame of type {kind:#04x} has {len} bytes, which is too short")]
    Short {
        /// The frame's type.
        kind: u8,
        /// Its body's length.
        len: usize,
    },
    /// The greeting is not a DERP server's.
    #[error("the other side does not speak DERP")]
    Magic,
    /// An info frame was not sealed by the key it names, or not to ours.
    #[error("DERP info frame does not open with our key and the sender's")]
    Sealed,
    /// An info frame's content.
    #[error("DERP info frame cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    /// The connection broke.
    #[error("the DERP connection broke: {0}")]
    Io(#[from] io::Error),
}

/// One message between client and relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Server's greeting.
    ServerKey(DerpServerPublicKey),
    /// Client's answer to it; [`ClientInfo::open`] reads it.
    ClientInfo {
        /// The client's node key.
        key: NodePublicKey,
        /// Nonce and box.
        sealed: Bytes,
    },
    /// Server's answer to that; [`ServerInfo::open`] reads it.
    ServerInfo {
        /// Nonce and box.
        sealed: Bytes,
    },
    /// Client to server: pass this on.
    SendPacket {
        /// To whom.
        dst: NodePublicKey,
        /// At most [`MAX_PACKET`] bytes.
        payload: Bytes,
    },
    /// Server to client: this is for you.
    RecvPacket {
        /// From whom.
        src: NodePublicKey,
        /// At most [`MAX_PACKET`] bytes.
        payload: Bytes,
    },
    /// The connection lives; needs no answer.
    KeepAlive,
    /// Client to server: whether this is the client's home.
    NotePreferred(bool),
    /// Server to client: a packet cannot go there (any more).
    PeerGone {
        /// Who is gone.
        key: NodePublicKey,
        /// Why.
        reason: PeerGoneReason,
    },
    /// Server to server in a mesh: a client is connected.
    PeerPresent {
        /// Who is here.
        key: NodePublicKey,
        /// From where, if it is told.
        addr: Option<SocketAddr>,
        /// Bits of derp.PeerPresentFlags; 0: not told.
        flags: u8,
    },
    /// Server to server in a mesh: pass this on.
    ForwardPacket {
        /// From whom.
        src: NodePublicKey,
        /// To whom.
        dst: NodePublicKey,
        /// At most [`MAX_PACKET`] bytes.
        payload: Bytes,
    },
    /// Answer with a pong of the same bytes.
    Ping([u8; 8]),
    /// Answer to a ping.
    Pong([u8; 8]),
    /// Server to client: what is wrong with the connection; empty: nothing any more.
    Health(String),
    /// Server to client: the server restarts.
    Restarting {
        /// Wait that long before reconnecting.
        reconnect_in: Duration,
        /// Then try for that long.
        try_for: Duration,
    },
    /// A type that is not spoken here; safe to ignore.
    Unknown {
        /// The frame's type.
        kind: u8,
        /// Its body.
        payload: Bytes,
    },
}

/// Why a peer cannot be reached at this relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerGoneReason {
    /// It was here and has left.
    Disconnected,
    /// It is not known here.
    NotHere,
    /// A later version's.
    Other(u8),
}

impl From<u8> for PeerGoneReason {
    fn from(byte: u8) -> Self {
        match byte {
            0 => Self::Disconnected,
            1 => Self::NotHere,
            other => Self::Other(other),
        }
    }
}

impl From<PeerGoneReason> for u8 {
    fn from(reason: PeerGoneReason) -> Self {
        match reason {
            PeerGoneReason::Disconnected => 0,
            PeerGoneReason::NotHere => 1,
            PeerGoneReason::Other(other) => other,
        }
    }
}

/// Reads and writes [`Frame`]s; a packet's bytes are not copied on reading.
#[derive(Clone, Copy, Debug, Default)]
pub struct Codec;

impl Decoder for Codec {
    type Item = Frame;
    type Error = Error;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Frame>, Error> {
        let Some(&[kind, l0, l1, l2, l3]) = src.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let len = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if len > limit(kind) {
            return Err(Error::Long { kind, len });
        }
        if src.len() < HEADER + len {
            src.reserve(HEADER + len - src.len());
            return Ok(None);
        }
        src.advance(HEADER);
        decode_body(kind, src.split_to(len).freeze()).map(Some)
    }
}

fn limit(kind: u8) -> usize {
    match kind {
        kind::CLIENT_INFO | kind::SERVER_INFO => MAX_INFO,
        _ => MAX_FRAME,
    }
}

/// Bytes beyond the known ones are a later version's and ignored, as derp_client.go does.
fn decode_body(kind: u8, mut body: Bytes) -> Result<Frame, Error> {
    let short = Error::Short {
        kind,
        len: body.len(),
    };
    let key = |body: &mut Bytes| take(body).map(NodePublicKey::from_bytes);
    Ok(match kind {
        kind::SERVER_KEY => {
            if !body.starts_with(MAGIC) {
                return Err(Error::Magic);
            }
            body.advance(MAGIC.len());
            Frame::ServerKey(DerpServerPublicKey::from_bytes(
                take(&mut body).ok_or(short)?,
            ))
        }
        kind::CLIENT_INFO => Frame::ClientInfo {
            key: key(&mut body).ok_or(short)?,
            sealed: body,
        },
        kind::SERVER_INFO => Frame::ServerInfo { sealed: body },
        kind::SEND_PACKET => Frame::SendPacket {
            dst: key(&mut body).ok_or(short)?,
            payload: body,
        },
        kind::RECV_PACKET => Frame::RecvPacket {
            src: key(&mut body).ok_or(short)?,
            payload: body,
        },
        kind::KEEP_ALIVE => Frame::KeepAlive,
        kind::NOTE_PREFERRED => Frame::NotePreferred(*body.first().ok_or(short)? != 0),
        kind::PEER_GONE => {
            let key = key(&mut body).ok_or(short)?;
            // Servers before 2023 sent no reason.
            let reason = body.first().copied().unwrap_or(0).into();
            Frame::PeerGone { key, reason }
        }
        kind::PEER_PRESENT => {
            let key = key(&mut body).ok_or(short)?;
            let addr = take::<18>(&mut body).map(get_addr);
            let flags = body.first().copied().unwrap_or(0);
            Frame::PeerPresent { key, addr, flags }
        }
        kind::FORWARD_PACKET => match (key(&mut body), key(&mut body)) {
            (Some(src), Some(dst)) => Frame::ForwardPacket {
                src,
                dst,
                payload: body,
            },
            _ => return Err(short),
        },
        kind::PING => Frame::Ping(take(&mut body).ok_or(short)?),
        kind::PONG => Frame::Pong(take(&mut body).ok_or(short)?),
        kind::HEALTH => Frame::Health(String::from_utf8_lossy(&body).into_owned()),
        kind::RESTARTING => {
            let mut millis =
                || take(&mut body).map(|ms| Duration::from_millis(u32::from_be_bytes(ms).into()));
            match (millis(), millis()) {
                (Some(reconnect_in), Some(try_for)) => Frame::Restarting {
                    reconnect_in,
                    try_for,
                },
                _ => return Err(short),
            }
        }
        kind => Frame::Unknown {
            kind,
            payload: body,
        },
    })
}

fn take<const N: usize>(body: &mut Bytes) -> Option<[u8; N]> {
    let bytes = *body.first_chunk()?;
    body.advance(N);
    Some(bytes)
}

fn get_addr(bytes: [u8; 18]) -> SocketAddr {
    let [ip @ .., p0, p1] = bytes;
    SocketAddr::new(
        Ipv6Addr::from(ip).to_canonical(),
        u16::from_be_bytes([p0, p1]),
    )
}

impl Encoder<Frame> for Codec {
    type Error = Error;

    fn encode(&mut self, frame: Frame, out: &mut BytesMut) -> Result<(), Error> {
        use Frame::*;
        match &frame {
            ServerKey(key) => put(out, kind::SERVER_KEY, &[MAGIC, key.export().as_bytes()]),
            ClientInfo { key, sealed } => {
                put(out, kind::CLIENT_INFO, &[key.export().as_bytes(), sealed])
            }
            ServerInfo { sealed } => put(out, kind::SERVER_INFO, &[sealed]),
            SendPacket { dst, payload } => {
                put(out, kind::SEND_PACKET, &[dst.export().as_bytes(), payload])
            }
            RecvPacket { src, payload } => {
                put(out, kind::RECV_PACKET, &[src.export().as_bytes(), payload])
            }
            KeepAlive => put(out, kind::KEEP_ALIVE, &[]),
            NotePreferred(home) => put(out, kind::NOTE_PREFERRED, &[&[u8::from(*home)]]),
            PeerGone { key, reason } => put(
                out,
                kind::PEER_GONE,
                &[key.export().as_bytes(), &[u8::from(*reason)]],
            ),
            PeerPresent { key, addr, flags } => {
                let mut rest = Vec::new();
                if let Some(addr) = addr {
                    let ip = match addr.ip() {
                        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                        IpAddr::V6(v6) => v6,
                    };
                    rest.extend_from_slice(&ip.octets());
                    rest.extend_from_slice(&addr.port().to_be_bytes());
                    rest.push(*flags);
                }
                put(out, kind::PEER_PRESENT, &[key.export().as_bytes(), &rest])
            }
            ForwardPacket { src, dst, payload } => put(
                out,
                kind::FORWARD_PACKET,
                &[src.export().as_bytes(), dst.export().as_bytes(), payload],
            ),
            Ping(data) => put(out, kind::PING, &[data]),
            Pong(data) => put(out, kind::PONG, &[data]),
            Health(problem) => put(out, kind::HEALTH, &[problem.as_bytes()]),
            Restarting {
                reconnect_in,
                try_for,
            } => {
                let millis = |d: &Duration| {
                    u32::try_from(d.as_millis())
                        .unwrap_or(u32::MAX)
                        .to_be_bytes()
                };
                put(
                    out,
                    kind::RESTARTING,
                    &[&millis(reconnect_in), &millis(try_for)],
                )
            }
            Unknown { kind, payload } => put(out, *kind, &[payload]),
        }
    }
}

fn put(out: &mut BytesMut, kind: u8, parts: &[&[u8]]) -> Result<(), Error> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    if len > limit(kind) {
        return Err(Error::Long { kind, len });
    }
    out.reserve(HEADER + len);
    out.put_u8(kind);
    // Far below 4 GiB by the check above.
    out.put_u32(len as u32);
    for part in parts {
        out.put_slice(part);
    }
    Ok(())
}

/// What a client says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientInfo {
    /// [`VERSION`].
    #[serde(default)]
    pub version: u32,
    /// It answers pings.
    #[serde(default, rename = "CanAckPings")]
    pub can_ack_pings: bool,
    /// It only measures the relay.
    #[serde(
        default,
        rename = "IsProber",
        skip_serializing_if = "std::ops::Not::not"
    )]
    pub is_prober: bool,
}

impl Default for ClientInfo {
    fn default() -> Self {
        Self {
            version: VERSION,
            can_ack_pings: true,
            is_prober: false,
        }
    }
}

impl ClientInfo {
    /// The frame by which `node` names itself to `server`.
    pub fn seal(&self, node: &NodeKeyPair, server: &DerpServerPublicKey) -> Result<Frame, Error> {
        let sealed = seal(
            &node.private,
            &server.to_crypto_box(),
            &serde_json::to_vec(self)?,
        )?;
        Ok(Frame::ClientInfo {
            key: node.public,
            sealed,
        })
    }

    /// What the client of `key` says; proves that it holds the key.
    pub fn open(
        sealed: &[u8],
        key: &NodePublicKey,
        server: &NodePrivateKey,
    ) -> Result<Self, Error> {
        Ok(serde_json::from_slice(&open(
            server,
            &key.to_crypto_box(),
            sealed,
        )?)?)
    }
}

/// What a server says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerInfo {
    /// [`VERSION`].
    #[serde(default)]
    pub version: u32,
    /// Bytes a second that the client should keep to; 0: not told.
    #[serde(
        default,
        rename = "TokenBucketBytesPerSecond",
        skip_serializing_if = "is_zero"
    )]
    pub bytes_per_second: u64,
    /// Bytes that it may send at once; 0: not told.
    #[serde(
        default,
        rename = "TokenBucketBytesBurst",
        skip_serializing_if = "is_zero"
    )]
    pub bytes_burst: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Default for ServerInfo {
    fn default() -> Self {
        Self {
            version: VERSION,
            bytes_per_second: 0,
            bytes_burst: 0,
        }
    }
}

impl ServerInfo {
    /// The frame that tells this to the client of `key`.
    pub fn seal(&self, server: &NodePrivateKey, key: &NodePublicKey) -> Result<Frame, Error> {
        let sealed = seal(server, &key.to_crypto_box(), &serde_json::to_vec(self)?)?;
        Ok(Frame::ServerInfo { sealed })
    }

    /// What `server` says to `node`; proves that it holds its key.
    pub fn open(
        sealed: &[u8],
        server: &DerpServerPublicKey,
        node: &NodePrivateKey,
    ) -> Result<Self, Error> {
        Ok(serde_json::from_slice(&open(
            node,
            &server.to_crypto_box(),
            sealed,
        )?)?)
    }
}

fn seal(ours: &NodePrivateKey, theirs: &PublicKey, plain: &[u8]) -> Result<Bytes, Error> {
    let nonce = SalsaBox::generate_nonce(&mut OsRng);
    let sealed = SalsaBox::new(theirs, &ours.to_crypto_box())
        .encrypt(&nonce, plain)
        .map_err(|_| Error::Sealed)?;
    Ok([nonce.as_slice(), &sealed].concat().into())
}

fn open(ours: &NodePrivateKey, theirs: &PublicKey, sealed: &[u8]) -> Result<Vec<u8>, Error> {
    let (nonce, sealed) = sealed.split_first_chunk::<NONCE>().ok_or(Error::Sealed)?;
    SalsaBox::new(theirs, &ours.to_crypto_box())
        .decrypt(&(*nonce).into(), sealed)
        .map_err(|_| Error::Sealed)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn encoded(frame: Frame) -> BytesMut {
        let mut out = BytesMut::new();
        Codec.encode(frame, &mut out).unwrap();
        out
    }

    fn server_key(server: &NodeKeyPair) -> DerpServerPublicKey {
        DerpServerPublicKey::from_bytes(*server.public.export().as_bytes())
    }

    fn keys() -> impl Strategy<Value = NodePublicKey> {
        any::<[u8; 32]>().prop_map(NodePublicKey::from_bytes)
    }

    fn payloads() -> impl Strategy<Value = Bytes> {
        vec(any::<u8>(), 0..2000).prop_map(Bytes::from)
    }

    fn frames() -> impl Strategy<Value = Frame> {
        let addr = (any::<IpAddr>(), any::<u16>())
            .prop_map(|(ip, port)| SocketAddr::new(ip.to_canonical(), port));
        let millis = || any::<u32>().prop_map(|ms| Duration::from_millis(ms.into()));
        prop_oneof![
            any::<[u8; 32]>().prop_map(|k| Frame::ServerKey(DerpServerPublicKey::from_bytes(k))),
            (keys(), payloads()).prop_map(|(key, sealed)| Frame::ClientInfo { key, sealed }),
            payloads().prop_map(|sealed| Frame::ServerInfo { sealed }),
            (keys(), payloads()).prop_map(|(dst, payload)| Frame::SendPacket { dst, payload }),
            (keys(), payloads()).prop_map(|(src, payload)| Frame::RecvPacket { src, payload }),
            Just(Frame::KeepAlive),
            any::<bool>().prop_map(Frame::NotePreferred),
            (keys(), any::<u8>()).prop_map(|(key, reason)| Frame::PeerGone {
                key,
                reason: reason.into()
            }),
            (keys(), proptest::option::of((addr, any::<u8>()))).prop_map(|(key, from)| {
                let (addr, flags) = from.map_or((None, 0), |(addr, flags)| (Some(addr), flags));
                Frame::PeerPresent { key, addr, flags }
            }),
            (keys(), keys(), payloads()).prop_map(|(src, dst, payload)| Frame::ForwardPacket {
                src,
                dst,
                payload
            }),
            any::<[u8; 8]>().prop_map(Frame::Ping),
            any::<[u8; 8]>().prop_map(Frame::Pong),
            any::<String>().prop_map(Frame::Health),
            (millis(), millis()).prop_map(|(reconnect_in, try_for)| Frame::Restarting {
                reconnect_in,
                try_for
            }),
            (0x20u8.., payloads()).prop_map(|(kind, payload)| Frame::Unknown { kind, payload }),
        ]
    }

    proptest! {
        #[test]
        fn frames_survive_any_cut(frames in vec(frames(), 1..5), step in 1usize..700) {
            let mut stream = BytesMut::new();
            for frame in &frames {
                Codec.encode(frame.clone(), &mut stream).unwrap();
            }
            let (mut src, mut got) = (BytesMut::new(), Vec::new());
            for piece in stream.chunks(step) {
                src.extend_from_slice(piece);
                while let Some(frame) = Codec.decode(&mut src).unwrap() {
                    got.push(frame);
                }
            }
            prop_assert_eq!(got, frames);
            prop_assert!(src.is_empty());
        }

        #[test]
        fn no_bytes_panic(kind in 0u8..0x20, body: Vec<u8>) {
            let _ = decode_body(kind, body.clone().into());
            let _ = Codec.decode(&mut BytesMut::from(&body[..]));
            let (ours, theirs) = (NodePrivateKey::random(), NodePublicKey::random());
            let _ = open(&ours, &theirs.to_crypto_box(), &body);
        }
    }

    #[test]
    fn frames_are_those_of_derp_go() {
        let key = || NodePublicKey::from_bytes([7; 32]);
        let with_key = |head: &[u8], tail: &[u8]| [head, &[7; 32], tail].concat();
        let golden = [
            (
                Frame::ServerKey(DerpServerPublicKey::from_bytes([7; 32])),
                with_key(b"\x01\0\0\0\x28DERP\xf0\x9f\x94\x91", b""),
            ),
            (
                Frame::SendPacket {
                    dst: key(),
                    payload: Bytes::from_static(b"hi"),
                },
                with_key(b"\x04\0\0\0\x22", b"hi"),
            ),
            (
                Frame::RecvPacket {
                    src: key(),
                    payload: Bytes::from_static(b"hi"),
                },
                with_key(b"\x05\0\0\0\x22", b"hi"),
            ),
            (Frame::KeepAlive, b"\x06\0\0\0\0".to_vec()),
            (Frame::NotePreferred(true), b"\x07\0\0\0\x01\x01".to_vec()),
            (
                Frame::PeerGone {
                    key: key(),
                    reason: PeerGoneReason::NotHere,
                },
                with_key(b"\x08\0\0\0\x21", b"\x01"),
            ),
            (
                Frame::Ping(*b"12345678"),
                b"\x12\0\0\0\x0812345678".to_vec(),
            ),
            (Frame::Health("bad".into()), b"\x14\0\0\0\x03bad".to_vec()),
            (
                Frame::Restarting {
                    reconnect_in: Duration::from_millis(1),
                    try_for: Duration::from_millis(2),
                },
                b"\x15\0\0\0\x08\0\0\0\x01\0\0\0\x02".to_vec(),
            ),
        ];
        for (frame, bytes) in golden {
            assert_eq!(encoded(frame.clone()), bytes);
            assert_eq!(
                Codec.decode(&mut BytesMut::from(&bytes[..])).unwrap(),
                Some(frame)
            );
        }
    }

    #[test]
    fn old_servers_give_no_reason() {
        let bytes = [&[kind::PEER_GONE, 0, 0, 0, 32][..], &[7; 32]].concat();
        assert_eq!(
            Codec.decode(&mut BytesMut::from(&bytes[..])).unwrap(),
            Some(Frame::PeerGone {
                key: NodePublicKey::from_bytes([7; 32]),
                reason: PeerGoneReason::Disconnected
            })
        );
    }

    #[test]
    fn lengths_are_bounded_before_anything_is_kept() {
        for (kind, len) in [
            (kind::RECV_PACKET, MAX_FRAME),
            (kind::CLIENT_INFO, MAX_INFO),
            (0x77, MAX_FRAME),
        ] {
            let header = |len: usize| {
                let mut src = BytesMut::from(&[kind][..]);
                src.put_u32(len as u32);
                src
            };
            assert!(matches!(Codec.decode(&mut header(len)), Ok(None)));
            assert!(matches!(
                Codec.decode(&mut header(len + 1)),
                Err(Error::Long { .. })
            ));
        }
        let payload = Bytes::from(vec![0; MAX_FRAME]);
        let dst = NodePublicKey::random();
        let refused = Codec.encode(Frame::SendPacket { dst, payload }, &mut BytesMut::new());
        assert!(matches!(refused, Err(Error::Long { .. })));
    }

    #[test]
    fn infos_open_only_for_the_right_keys() {
        let (node, server) = (NodeKeyPair::random(), NodeKeyPair::random());
        let info = ClientInfo::default();
        let Frame::ClientInfo { key, sealed } = info.seal(&node, &server_key(&server)).unwrap()
        else {
            panic!("not a client info");
        };
        assert_eq!(
            ClientInfo::open(&sealed, &key, &server.private).unwrap(),
            info
        );
        let other = NodePublicKey::random();
        assert!(matches!(
            ClientInfo::open(&sealed, &other, &server.private),
            Err(Error::Sealed)
        ));

        let info = ServerInfo {
            bytes_per_second: 5,
            ..ServerInfo::default()
        };
        let Frame::ServerInfo { sealed } = info.seal(&server.private, &node.public).unwrap() else {
            panic!("not a server info");
        };
        let opened = ServerInfo::open(&sealed, &server_key(&server), &node.private).unwrap();
        assert_eq!(opened, info);
    }

    #[test]
    fn infos_are_the_json_of_go() {
        let json = |info: &ClientInfo| serde_json::to_string(info).unwrap();
        assert_eq!(
            json(&ClientInfo::default()),
            r#"{"version":2,"CanAckPings":true}"#
        );
        let theirs = r#"{"version":2,"CanAckPings":true,"IsProber":true,"AppName":"x"}"#;
        assert!(
            serde_json::from_str::<ClientInfo>(theirs)
                .unwrap()
                .is_prober
        );
        let json = serde_json::to_string(&ServerInfo::default()).unwrap();
        assert_eq!(json, r#"{"version":2}"#);
    }
}
