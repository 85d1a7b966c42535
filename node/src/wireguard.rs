//! WireGuard between two nodes: handshakes, keys and their age, and the packets between (its paper:
//! wireguard.com/papers/wireguard.pdf).
//!
//! Sans-IO and without a clock of its own. An [`Identity`] is this node to all its peers: it judges who
//! calls. A [`Tunnel`] is one peer: it says when a handshake is due and holds up to three
//! [`Session`]s, which seal and open packets a train at a time.

mod handshake;
mod session;
mod tunnel;
#[cfg(target_arch = "x86_64")]
mod wide;
mod window;

pub use handshake::{Heard, Identity, Initiation};
pub use tunnel::{Due, Tunnel};

/// What stands before a packet in its datagram, and its tag behind it, in bytes.
pub const HEADER: usize = 16;
pub const TAG: usize = 16;
pub const OVERHEAD: usize = HEADER + TAG;

/// How long the messages of a handshake are.
pub const INITIATION: usize = 148;
pub const RESPONSE: usize = 92;
pub const COOKIE: usize = 64;

/// What a datagram is, by its first bytes and its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Somebody begins a handshake; who, only [`Identity::hear`] can tell.
    Initiation,
    /// An answer to the initiation of this index.
    Response(u32),
    /// An initiation of this index is to be repeated with a cookie.
    Cookie(u32),
    /// A packet in the session of this index.
    Data(u32),
}

impl Kind {
    /// `None`: it is none of WireGuard's.
    pub fn of(datagram: &[u8]) -> Option<Self> {
        let word = |at: usize| {
            let bytes = datagram.get(at..)?.first_chunk()?;
            Some(u32::from_le_bytes(*bytes))
        };
        match (word(0)?, datagram.len()) {
            (1, INITIATION) => Some(Self::Initiation),
            (2, RESPONSE) => Some(Self::Response(word(8)?)),
            (3, COOKIE) => Some(Self::Cookie(word(4)?)),
            (4, OVERHEAD..) => Some(Self::Data(word(4)?)),
            _ => None,
        }
    }
}
