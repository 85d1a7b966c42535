//! ts2021: the encrypted channel between a node and its coordination server (control/controlbase).
//!
//! `Noise_IK_25519_ChaChaPoly_BLAKE2s`. The node's first message travels in the header
//! `X-Tailscale-Handshake` of an HTTP upgrade to `tailscale-control-protocol`; the answer and all
//! that follows are records of at most 4096 bytes on the upgraded connection. The server may put
//! an early payload in front of what it says; the node's [`Channel`] drops it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{Buf, BytesMut};
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_util::codec::{Decoder, Encoder, Framed};
use ts_control_noise::BiCodec;
use ts_keys::{MachineKeyPair, MachinePublicKey};
use ts_noise::{
    core::Session,
    ik::{ReceivedHandshake, SentHandshake},
};

use crate::tailcfg::EarlyNoise;

/// The protocol's name in the HTTP upgrade.
pub const UPGRADE: &str = "tailscale-control-protocol";
/// The HTTP header with the node's first message, base64.
pub const HANDSHAKE_HEADER: &str = "X-Tailscale-Handshake";

const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;
const ERROR: u8 = 3;
const RECORD: u8 = 4;
/// Type and big-endian length.
const HEADER: usize = 3;
/// The initiation alone has the protocol version before its header.
const INITIATION_HEADER: usize = 2 + HEADER;
/// Poly1305's tag.
const TAG: usize = 16;
/// Whole record (controlbase's maxMessageSize).
const MAX_RECORD: usize = 4096;
/// Bounds what one write call may queue.
const MAX_WRITE: usize = 16 * 1024;
/// In place of the first 9 bytes of HTTP/2, which cannot begin so (control/ts2021/conn.go).
const EARLY_MAGIC: &[u8; 5] = b"\xff\xff\xffTS";
const EARLY_HEADER: usize = EARLY_MAGIC.len() + 4;
/// Real ones have about a hundred bytes.
const MAX_EARLY: usize = 1 << 20;

/// Why no channel came to be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The first message is not one.
    #[error("the Noise initiation is malformed: not a Tailscale client?")]
    Initiation,
    /// The other side holds another key than the one expected, or the bytes were changed.
    #[error("the Noise handshake failed: the control server's key is not the one it published")]
    Handshake,
    /// The server answered with something else than a handshake.
    #[error("the control server answered the Noise handshake with message type {0}")]
    Unexpected(u8),
    /// The server refused, in its own words.
    #[error("the control server refused the Noise handshake: {0}")]
    Refused(String),
    /// The connection broke.
    #[error("the connection broke during the Noise handshake: {0}")]
    Io(#[from] io::Error),
}

/// The node's side of a handshake, waiting for the server's answer.
pub struct Pending {
    state: SentHandshake,
    machine: MachineKeyPair,
}

/// Begins a handshake: what to keep, and the value of [`HANDSHAKE_HEADER`].
///
/// `version` is the node's capability version; `control` is what `/key` published.
pub fn initiate(
    machine: &MachineKeyPair,
    control: &MachinePublicKey,
    version: u16,
) -> (Pending, String) {
    let mut message = [0; INITIATION_HEADER + SentHandshake::INIT_SIZE];
    let (header, body) = message.split_at_mut(INITIATION_HEADER);
    let [v0, v1] = version.to_be_bytes();
    header.copy_from_slice(&[v0, v1, INITIATION, 0, SentHandshake::INIT_SIZE as u8]);
    let state = SentHandshake::new(
        machine.to_x25519_dalek(),
        control.to_x25519_dalek(),
        prologue(version).as_bytes(),
        body,
    );
    let pending = Pending {
        state,
        machine: machine.clone(),
    };
    (pending, STANDARD.encode(message))
}

impl Pending {
    /// Reads the server's answer from the upgraded connection.
    pub async fn complete<T>(self, mut io: T) -> Result<Channel<T>, Error>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let mut header = [0; HEADER];
        io.read_exact(&mut header).await?;
        let [kind, l0, l1] = header;
        let len = usize::from(u16::from_be_bytes([l0, l1]));
        if len > MAX_RECORD {
            return Err(Error::Unexpected(kind));
        }
        let mut body = vec![0; len];
        io.read_exact(&mut body).await?;
        match kind {
            RESPONSE => {
                let session = self
                    .state
                    .try_finish(&mut body, self.machine.to_x25519_dalek())
                    .map_err(|_| Error::Handshake)?;
                Ok(Channel::new(io, session, true))
            }
            ERROR => Err(Error::Refused(String::from_utf8_lossy(&body).into_owned())),
            other => Err(Error::Unexpected(other)),
        }
    }
}

/// A handshake that the server accepted.
pub struct Accepted<T> {
    /// The channel, ready for HTTP/2 (after an early payload, if any).
    pub channel: Channel<T>,
    /// The machine at its other end, authenticated.
    pub machine: MachinePublicKey,
    /// Its capability version.
    pub version: u16,
}

/// The server's side: answers `initiation` (decoded from [`HANDSHAKE_HEADER`]) on the upgraded
/// connection.
pub async fn accept<T>(
    mut io: T,
    initiation: &[u8],
    control: &MachineKeyPair,
) -> Result<Accepted<T>, Error>
where
    T: AsyncRead + AsyncWrite + Unpin + Send,
{
    let (version, mut body) = parse_initiation(initiation).ok_or(Error::Initiation)?;
    let received = ReceivedHandshake::new(
        &mut body,
        prologue(version).as_bytes(),
        &control.to_x25519_dalek(),
    )
    .ok_or(Error::Initiation)?;
    let machine = MachinePublicKey::from_bytes(received.peer_static_pub.to_bytes());

    let mut answer = [0; HEADER + ReceivedHandshake::RESP_SIZE];
    let (header, body) = answer.split_at_mut(HEADER);
    header.copy_from_slice(&[RESPONSE, 0, ReceivedHandshake::RESP_SIZE as u8]);
    let session = received.finish(body);
    io.write_all(&answer).await?;
    io.flush().await?;
    Ok(Accepted {
        channel: Channel::new(io, session, false),
        machine,
        version,
    })
}

/// The version and the Noise message of an initiation.
fn parse_initiation(bytes: &[u8]) -> Option<(u16, [u8; SentHandshake::INIT_SIZE])> {
    let (&[v0, v1, kind, l0, l1], body) = bytes.split_first_chunk::<INITIATION_HEADER>()?;
    let body: &[u8; SentHandshake::INIT_SIZE] = body.try_into().ok()?;
    let len = usize::from(u16::from_be_bytes([l0, l1]));
    (kind == INITIATION && len == body.len()).then(|| (u16::from_be_bytes([v0, v1]), *body))
}

fn prologue(version: u16) -> String {
    format!("Tailscale Control Protocol v{version}")
}

/// What the server writes to a fresh [`Channel`] before HTTP/2 begins.
pub fn early_payload(early: &EarlyNoise) -> Result<Vec<u8>, serde_json::Error> {
    let json = serde_json::to_vec(early)?;
    let mut out = Vec::with_capacity(EARLY_HEADER + json.len());
    out.extend_from_slice(EARLY_MAGIC);
    // A key and its name: far below 4 GiB.
    out.extend_from_slice(&(json.len() as u32).to_be_bytes());
    out.extend_from_slice(&json);
    Ok(out)
}

/// Removes an early payload from the front of `plain`; false: more bytes are needed to tell.
fn strip_early(plain: &mut BytesMut) -> io::Result<bool> {
    let seen = plain.len().min(EARLY_MAGIC.len());
    if plain[..seen] != EARLY_MAGIC[..seen] {
        return Ok(true);
    }
    let Some(header) = plain.first_chunk::<EARLY_HEADER>() else {
        return Ok(false);
    };
    let [.., l0, l1, l2, l3] = *header;
    let len = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    if len > MAX_EARLY {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the control server's early payload of {len} bytes is too long"),
        ));
    }
    if plain.len() < EARLY_HEADER + len {
        return Ok(false);
    }
    plain.advance(EARLY_HEADER + len);
    Ok(true)
}

/// An authenticated, encrypted byte stream.
pub struct Channel<T> {
    framed: Framed<T, Records>,
    /// Decrypted and not yet read.
    plain: BytesMut,
    /// An early payload may still come.
    early: bool,
}

impl<T: AsyncRead + AsyncWrite> Channel<T> {
    fn new(io: T, session: Session, early: bool) -> Self {
        let framed = Framed::new(io, Records(session.into()));
        Self {
            framed,
            plain: BytesMut::new(),
            early,
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for Channel<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.early || this.plain.is_empty() {
            let Some(record) = ready!(Pin::new(&mut this.framed).poll_next(cx)).transpose()? else {
                // The other side has closed: what is left was no early payload.
                this.early = false;
                break;
            };
            if this.early {
                this.plain.extend_from_slice(&record);
                this.early = !strip_early(&mut this.plain)?;
            } else {
                this.plain = record;
            }
        }
        let n = this.plain.len().min(out.remaining());
        out.put_slice(&this.plain[..n]);
        this.plain.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Channel<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let data = &data[..data.len().min(MAX_WRITE)];
        let mut framed = Pin::new(&mut self.get_mut().framed);
        ready!(Sink::<&[u8]>::poll_ready(framed.as_mut(), cx))?;
        framed.start_send(data)?;
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Sink::<&[u8]>::poll_flush(Pin::new(&mut self.get_mut().framed), cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Sink::<&[u8]>::poll_close(Pin::new(&mut self.get_mut().framed), cx)
    }
}

/// The record layer, which lets only whole and well-formed records reach [`BiCodec`]: that panics
/// on one shorter than its tag, and swallows the other side's error messages.
struct Records(BiCodec);

impl Encoder<&[u8]> for Records {
    type Error = io::Error;

    fn encode(&mut self, plain: &[u8], out: &mut BytesMut) -> io::Result<()> {
        self.0.encode(plain, out)
    }
}

impl Decoder for Records {
    type Item = BytesMut;
    type Error = io::Error;

    fn decode(&mut self, src: &mut BytesMut) -> io::Result<Option<BytesMut>> {
        let invalid = |message| Err(io::Error::new(io::ErrorKind::InvalidData, message));
        let Some(&[kind, l0, l1]) = src.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let len = usize::from(u16::from_be_bytes([l0, l1]));
        if HEADER + len > MAX_RECORD {
            return invalid(format!("Noise record of {len} bytes is too long"));
        }
        match kind {
            RECORD if len < TAG => invalid(format!("Noise record of {len} bytes is too short")),
            RECORD => self.0.decode(src),
            ERROR if src.len() < HEADER + len => Ok(None),
            ERROR => {
                let text = String::from_utf8_lossy(&src[HEADER..HEADER + len]);
                invalid(format!("the other side ended the Noise channel: {text}"))
            }
            other => invalid(format!("unexpected Noise message type {other}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{DuplexStream, duplex};
    use ts_keys::ChallengePublicKey;

    use super::*;

    fn block_on<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(future)
    }

    /// Node's channel and what the server learned.
    async fn joined(version: u16) -> (Channel<DuplexStream>, Accepted<DuplexStream>) {
        let (machine, control) = (MachineKeyPair::random(), MachineKeyPair::random());
        let (node_io, server_io) = duplex(64);
        let (pending, header) = initiate(&machine, &control.public, version);
        let initiation = STANDARD.decode(header).unwrap();
        let (node, server) = tokio::join!(
            pending.complete(node_io),
            accept(server_io, &initiation, &control)
        );
        let server = server.unwrap();
        assert_eq!(server.machine, machine.public);
        (node.unwrap(), server)
    }

    async fn transfer(
        from: &mut Channel<DuplexStream>,
        to: &mut Channel<DuplexStream>,
        data: &[u8],
    ) {
        let mut got = vec![0; data.len()];
        let (sent, read) = tokio::join!(
            async {
                from.write_all(data).await?;
                from.flush().await
            },
            to.read_exact(&mut got)
        );
        sent.unwrap();
        read.unwrap();
        assert_eq!(got, data);
    }

    #[test]
    fn both_roles_agree() {
        block_on(async {
            let (mut node, mut server) = joined(113).await;
            assert_eq!(server.version, 113);
            transfer(&mut node, &mut server.channel, b"PRI * HTTP/2.0").await;
            transfer(&mut server.channel, &mut node, &vec![7; 100_000]).await;
            drop(server);
            assert_eq!(node.read(&mut [0; 8]).await.unwrap(), 0);
        });
    }

    #[test]
    fn an_early_payload_is_dropped() {
        block_on(async {
            let (mut node, mut server) = joined(113).await;
            let early = early_payload(&EarlyNoise {
                node_key_challenge: ChallengePublicKey::random(),
            })
            .unwrap();
            let (front, back) = early.split_at(3);
            for part in [front, back] {
                server.channel.write_all(part).await.unwrap();
            }
            transfer(&mut server.channel, &mut node, b"HTTP/2 settings").await;
        });
    }

    #[test]
    fn a_wrong_server_key_is_refused() {
        block_on(async {
            let (machine, control) = (MachineKeyPair::random(), MachineKeyPair::random());
            let (_, header) = initiate(&machine, &MachinePublicKey::random(), 113);
            let initiation = STANDARD.decode(header).unwrap();
            let refused = accept(duplex(64).0, &initiation, &control).await;
            assert!(matches!(refused, Err(Error::Initiation)));
        });
    }

    #[test]
    fn a_refusal_is_told_in_the_servers_words() {
        block_on(async {
            let (pending, _) =
                initiate(&MachineKeyPair::random(), &MachinePublicKey::random(), 113);
            let (node, mut server) = duplex(64);
            server.write_all(b"\x03\x00\x04nope").await.unwrap();
            let refused = pending.complete(node).await.err().unwrap();
            assert_eq!(
                refused.to_string(),
                "the control server refused the Noise handshake: nope"
            );
        });
    }

    /// The test of ts_noise pins the Noise messages; this pins our framing around them.
    #[test]
    fn an_initiation_has_version_type_and_length() {
        let (_, header) = initiate(
            &MachineKeyPair::random(),
            &MachinePublicKey::random(),
            0x0102,
        );
        let bytes = STANDARD.decode(header).unwrap();
        assert_eq!(bytes[..5], [1, 2, 1, 0, 96]);
        assert_eq!(bytes.len(), 101);
    }

    fn records() -> Records {
        let (machine, control) = (MachineKeyPair::random(), MachineKeyPair::random());
        let (_, header) = initiate(&machine, &control.public, 1);
        let (_, mut body) = parse_initiation(&STANDARD.decode(header).unwrap()).unwrap();
        let received = ReceivedHandshake::new(
            &mut body,
            prologue(1).as_bytes(),
            &control.to_x25519_dalek(),
        );
        Records(
            received
                .unwrap()
                .finish(&mut [0; ReceivedHandshake::RESP_SIZE])
                .into(),
        )
    }

    proptest! {
        #[test]
        fn any_writes_arrive(chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..9000), 1..4)) {
            block_on(async {
                let (mut node, mut server) = joined(113).await;
                for chunk in &chunks {
                    transfer(&mut server.channel, &mut node, chunk).await;
                    transfer(&mut node, &mut server.channel, chunk).await;
                }
            });
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, kind in 0u8..6, len in 0u16..40) {
            let mut framed = vec![kind];
            framed.extend_from_slice(&len.to_be_bytes());
            framed.extend_from_slice(&bytes);
            let _ = parse_initiation(&bytes);
            for bytes in [bytes, framed] {
                let mut src = BytesMut::from(&bytes[..]);
                let _ = records().decode(&mut src);
                let _ = strip_early(&mut BytesMut::from(&bytes[..]));
            }
        }

        #[test]
        fn an_early_payload_is_found_in_any_pieces(cut in 0usize..9, rest: Vec<u8>) {
            let early = early_payload(&EarlyNoise { node_key_challenge: ChallengePublicKey::random() }).unwrap();
            let whole: Vec<u8> = early.iter().chain(&rest).copied().collect();
            let mut plain = BytesMut::from(&whole[..cut]);
            prop_assert!(!strip_early(&mut plain).unwrap());
            plain.extend_from_slice(&whole[cut..]);
            prop_assert!(strip_early(&mut plain).unwrap());
            prop_assert_eq!(&plain[..], &rest[..]);
        }
    }
}
