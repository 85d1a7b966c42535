//! Disco: how two peers find and watch a direct path (disco/disco.go).
//!
//! A message is `TS💬`, the sender's disco key, a nonce, and a NaCl box of type, version and body.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crypto_box::{
    SalsaBox,
    aead::{Aead, AeadCore, OsRng},
};
use ts_keys::{DiscoPrivateKey, DiscoPublicKey, NodePublicKey};

/// First bytes of every disco message.
pub const MAGIC: &[u8; 6] = "TS💬".as_bytes().first_chunk().unwrap();
const KEY: usize = 32;
const NONCE: usize = 24;
const HEADER: usize = MAGIC.len() + KEY + NONCE;
/// An endpoint on the wire: an IPv6 (or mapped IPv4) address and a port.
const ENDPOINT: usize = 16 + 2;

/// Ties a pong to its ping.
pub type TxId = [u8; 12];

/// What peers say to find each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Are you reachable this way?
    Ping {
        /// Echoed by the pong.
        tx_id: TxId,
        /// The sender's node key; old senders leave it out.
        node_key: Option<NodePublicKey>,
    },
    /// Yes, and this is where your ping came from.
    Pong {
        /// The ping's.
        tx_id: TxId,
        /// The pinger's address as the ponger saw it.
        src: SocketAddr,
    },
    /// Sent by the relay: ping me at these, so that our NATs open.
    CallMeMaybe {
        /// Where to ping.
        endpoints: Vec<SocketAddr>,
    },
    /// A kind that this node does not speak (UDP relays); safe to ignore.
    Other(u8),
}

/// Why a disco message was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too short for its kind.
    #[error("disco message is cut short")]
    Short,
    /// Not meant for this key, or forged.
    #[error("disco message does not open with our key and the sender's")]
    Sealed,
}

/// The sender's disco key, if `packet` looks like a disco message.
pub fn sender(packet: &[u8]) -> Option<DiscoPublicKey> {
    let rest = packet.strip_prefix(MAGIC)?;
    if packet.len() < HEADER {
        return None;
    }
    rest.first_chunk()
        .map(|key| DiscoPublicKey::from_bytes(*key))
}

/// The shared secret of two disco keys. Costs a curve operation: keep it for a known peer.
pub struct Pair {
    ours: DiscoPublicKey,
    shared: SalsaBox,
}

impl Pair {
    /// The secret that `ours` shares with the holder of `theirs`.
    pub fn new(ours: &DiscoPrivateKey, theirs: &DiscoPublicKey) -> Self {
        Self {
            ours: ours.public_key(),
            shared: SalsaBox::new(&theirs.to_crypto_box(), &ours.to_crypto_box()),
        }
    }

    /// The whole datagram that carries `message`.
    pub fn seal(&self, message: &Message) -> Vec<u8> {
        use ts_keys::ExportableKey;
        let nonce = SalsaBox::generate_nonce(&mut OsRng);
        let mut out = Vec::with_capacity(HEADER + 16 + 64);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(self.ours.export().as_bytes());
        out.extend_from_slice(&nonce);
        // SalsaBox refuses only messages beyond 2^38 bytes, and ours are far below.
        if let Ok(sealed) = self.shared.encrypt(&nonce, message.encode().as_slice()) {
            out.extend_from_slice(&sealed);
        }
        out
    }

    /// The message in `packet`, which came from the peer of this pair.
    pub fn open(&self, packet: &[u8]) -> Result<Message, Error> {
        let nonce = packet.get(HEADER - NONCE..HEADER).ok_or(Error::Short)?;
        let nonce: [u8; NONCE] = nonce.try_into().map_err(|_| Error::Short)?;
        let plain = self
            .shared
            .decrypt(&nonce.into(), &packet[HEADER..])
            .map_err(|_| Error::Sealed)?;
        Message::decode(&plain)
    }
}

impl Message {
    fn encode(&self) -> Vec<u8> {
        use ts_keys::ExportableKey;
        let mut out = Vec::new();
        match self {
            Self::Ping { tx_id, node_key } => {
                out.extend_from_slice(&[1, 0]);
                out.extend_from_slice(tx_id);
                if let Some(key) = node_key {
                    out.extend_from_slice(key.export().as_bytes());
                }
            }
            Self::Pong { tx_id, src } => {
                out.extend_from_slice(&[2, 0]);
                out.extend_from_slice(tx_id);
                put_endpoint(&mut out, *src);
            }
            Self::CallMeMaybe { endpoints } => {
                out.extend_from_slice(&[3, 0]);
                for endpoint in endpoints {
                    put_endpoint(&mut out, *endpoint);
                }
            }
            Self::Other(kind) => out.extend_from_slice(&[*kind, 0]),
        }
        out
    }

    fn decode(plain: &[u8]) -> Result<Self, Error> {
        let [kind, version, body @ ..] = plain else {
            return Err(Error::Short);
        };
        // Bytes beyond the known ones are padding or a later version's: ignored, as disco.go does.
        Ok(match kind {
            1 => {
                let (tx_id, rest) = body.split_first_chunk().ok_or(Error::Short)?;
                let node_key = rest
                    .first_chunk()
                    .map(|key| NodePublicKey::from_bytes(*key));
                Self::Ping {
                    tx_id: *tx_id,
                    node_key,
                }
            }
            2 => {
                let (tx_id, rest) = body.split_first_chunk().ok_or(Error::Short)?;
                let src = rest.first_chunk().map(get_endpoint).ok_or(Error::Short)?;
                Self::Pong { tx_id: *tx_id, src }
            }
            3 if *version == 0 => {
                let (chunks, _) = body.as_chunks::<ENDPOINT>();
                Self::CallMeMaybe {
                    endpoints: chunks.iter().map(get_endpoint).collect(),
                }
            }
            other => Self::Other(*other),
        })
    }
}

fn put_endpoint(out: &mut Vec<u8>, endpoint: SocketAddr) {
    let ip = match endpoint.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    out.extend_from_slice(&ip.octets());
    out.extend_from_slice(&endpoint.port().to_be_bytes());
}

fn get_endpoint(bytes: &[u8; ENDPOINT]) -> SocketAddr {
    let mut ip = [0; 16];
    ip.copy_from_slice(&bytes[..16]);
    let port = u16::from_be_bytes([bytes[16], bytes[17]]);
    SocketAddr::new(Ipv6Addr::from(ip).to_canonical(), port)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pairs() -> (Pair, Pair) {
        let (a, b) = (DiscoPrivateKey::random(), DiscoPrivateKey::random());
        (
            Pair::new(&a, &b.public_key()),
            Pair::new(&b, &a.public_key()),
        )
    }

    fn endpoints() -> impl Strategy<Value = SocketAddr> {
        (any::<IpAddr>(), any::<u16>())
            .prop_map(|(ip, port)| SocketAddr::new(ip.to_canonical(), port))
    }

    fn messages() -> impl Strategy<Value = Message> {
        prop_oneof![
            (any::<TxId>(), any::<Option<[u8; 32]>>()).prop_map(|(tx_id, key)| Message::Ping {
                tx_id,
                node_key: key.map(NodePublicKey::from_bytes)
            }),
            (any::<TxId>(), endpoints()).prop_map(|(tx_id, src)| Message::Pong { tx_id, src }),
            proptest::collection::vec(endpoints(), 0..20)
                .prop_map(|endpoints| Message::CallMeMaybe { endpoints }),
        ]
    }

    proptest! {
        #[test]
        fn sealed_messages_open(message in messages()) {
            let (a, b) = pairs();
            let packet = a.seal(&message);
            prop_assert_eq!(sender(&packet), Some(a.ours));
            prop_assert_eq!(b.open(&packet), Ok(message));
        }

        #[test]
        fn a_changed_byte_is_refused(message in messages(), at in any::<proptest::sample::Index>(), flip in 1u8..) {
            let (a, b) = pairs();
            let mut packet = a.seal(&message);
            let at = MAGIC.len() + KEY + at.index(packet.len() - MAGIC.len() - KEY);
            packet[at] ^= flip;
            prop_assert_eq!(b.open(&packet), Err(Error::Sealed));
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let (_, b) = pairs();
            let _ = sender(&bytes);
            let _ = b.open(&bytes);
            let _ = Message::decode(&bytes);
        }
    }

    /// Bytes as disco_test.go has them.
    #[test]
    fn bodies_are_those_of_disco_go() {
        let tx_id = *b"\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c";
        let pong = Message::Pong {
            tx_id,
            src: "2.3.4.5:1234".parse().unwrap(),
        };
        assert_eq!(
            pong.encode(),
            b"\x02\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\
              \0\0\0\0\0\0\0\0\0\0\xff\xff\x02\x03\x04\x05\x04\xd2"
        );
        let call = Message::CallMeMaybe {
            endpoints: vec![
                "1.2.3.4:567".parse().unwrap(),
                "[2001::3456]:789".parse().unwrap(),
            ],
        };
        assert_eq!(
            call.encode(),
            b"\x03\x00\0\0\0\0\0\0\0\0\0\0\xff\xff\x01\x02\x03\x04\x02\x37\
              \x20\x01\0\0\0\0\0\0\0\0\0\0\0\0\x34\x56\x03\x15"
        );
    }
}
