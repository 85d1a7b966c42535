//! Who calls, and whether to answer: handshakes' messages, their MACs and cookies.

use std::{
    net::IpAddr,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use blake2::{
    Blake2s256, Blake2sMac, Digest,
    digest::{Mac as _, consts::U16},
};
use chacha20poly1305::{AeadInPlace as _, KeyInit, XChaCha20Poly1305};
use tailnode_wire::keys::{NodeKeyPair, NodePublicKey};
use ts_noise::ikpsk2;
use zeroize::Zeroizing;

use super::{COOKIE, INITIATION, Kind, RESPONSE};
use crate::clock::Latest;

const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// Tailscale knows no pre-shared keys.
const PSK: [u8; 32] = [0; 32];
/// Both MACs are at the end of a message.
const MACS: usize = 32;
/// Where Noise's part of a message begins.
const NOISE_OF_INITIATION: usize = 8;
const NOISE_OF_RESPONSE: usize = 12;
/// Handshakes a second before cookies are asked for.
const RATE: u32 = 100;
/// How long a cookie counts.
const COOKIE_LIFE: Duration = Duration::from_secs(120);

type Mac = [u8; 16];
/// When a handshake was begun (TAI64N), by which a peer tells it from a repetition.
pub type Timestamp = [u8; 12];

/// This node, as all its peers know it.
pub struct Identity {
    keys: NodeKeyPair,
    macs: MacKeys,
    /// What cookies are made with, since when; and those of before.
    secret: Zeroizing<[u8; 32]>,
    secret_since: Option<Instant>,
    heard: u32,
    heard_since: Option<Instant>,
    latest: Latest,
    stamped: Timestamp,
}

/// What [`Identity::hear`] made of a message.
pub enum Heard {
    /// It is worth no answer.
    Nothing,
    /// Too many call: the sender is to show first that it is where it says.
    Cookie([u8; COOKIE]),
    /// A peer begins a handshake.
    Initiation(Box<Initiation>),
    /// An answer of a peer's; whether it is what we wait for, its tunnel knows.
    Response,
}

/// A handshake that a peer has begun.
pub struct Initiation {
    /// Who it is; that it is, the handshake's end will prove.
    pub peer: NodePublicKey,
    pub(super) stamp: Timestamp,
    pub(super) sender: u32,
    noise: ikpsk2::ReceivedHandshake,
}

/// The keys that a session begins with: to send with, and to receive with.
pub type SessionKeys = ([u8; 32], [u8; 32]);

impl Identity {
    pub fn new(keys: NodeKeyPair) -> Self {
        Self {
            macs: MacKeys::new(&keys.public),
            keys,
            secret: Zeroizing::new(rand::random()),
            secret_since: None,
            heard: 0,
            heard_since: None,
            latest: Latest::begin(),
            stamped: [0; 12],
        }
    }

    /// Judges an initiation or a response: checks its MAC, and under load asks for a cookie, before
    /// the costly part. `from`: the sender's address, if it came straight.
    pub fn hear(&mut self, message: &[u8], from: Option<IpAddr>, now: Instant) -> Heard {
        let kind = Kind::of(message);
        let Some((rest, mac1, mac2)) = split_macs(message) else {
            return Heard::Nothing;
        };
        if !is_mac(&self.macs.first[..], &[rest], mac1) {
            return Heard::Nothing;
        }
        if self.is_under_load(now) {
            // A relay knows its sender, and has no address to show.
            let Some(from) = from else {
                return Heard::Nothing;
            };
            let cookie = self.cookie(from, now);
            if !is_mac(&cookie, &[rest, mac1], mac2) {
                return match rest[4..].first_chunk() {
                    Some(sender) => Heard::Cookie(self.macs.reply(*sender, &cookie, mac1)),
                    None => Heard::Nothing,
                };
            }
        }
        match kind {
            Some(Kind::Initiation) => match self.read(message) {
                Some(initiation) => Heard::Initiation(Box::new(initiation)),
                None => Heard::Nothing,
            },
            Some(Kind::Response(_)) => Heard::Response,
            _ => Heard::Nothing,
        }
    }

    fn read(&self, message: &[u8]) -> Option<Initiation> {
        let mut message: [u8; INITIATION] = message.try_into().ok()?;
        let sender = u32::from_le_bytes(*message[4..].first_chunk()?);
        let noise = &mut message[NOISE_OF_INITIATION..INITIATION - MACS];
        let keys = self.keys.to_x25519_dalek();
        let (noise, stamp) = ikpsk2::ReceivedHandshake::new::<Timestamp>(noise, PROLOGUE, keys)?;
        Some(Initiation {
            peer: NodePublicKey::from_bytes(noise.peer_static_pub.to_bytes()),
            stamp: *stamp,
            sender,
            noise,
        })
    }

    /// Begins a handshake with a peer.
    pub(super) fn initiate(
        &mut self,
        peer: &NodePublicKey,
        sender: u32,
        macs: &mut Macs,
        now: Instant,
    ) -> (Sent, [u8; INITIATION]) {
        let mut message = [0; INITIATION];
        message[0] = 1;
        message[4..8].copy_from_slice(&sender.to_le_bytes());
        let stamp = self.stamp();
        let noise = ikpsk2::SentHandshake::new(
            self.keys.to_x25519_dalek(),
            peer.to_x25519_dalek(),
            PROLOGUE,
            stamp,
            &mut message[NOISE_OF_INITIATION..INITIATION - MACS],
        );
        macs.write(&mut message, now);
        (Sent(noise), message)
    }

    /// Ends a handshake that a peer has begun. `sender` is our index of the session.
    pub(super) fn respond(
        &mut self,
        initiation: Initiation,
        sender: u32,
        macs: &mut Macs,
        now: Instant,
    ) -> (SessionKeys, [u8; RESPONSE]) {
        let mut message = [0; RESPONSE];
        message[0] = 2;
        message[4..8].copy_from_slice(&sender.to_le_bytes());
        message[8..12].copy_from_slice(&initiation.sender.to_le_bytes());
        let noise = &mut message[NOISE_OF_RESPONSE..RESPONSE - MACS];
        let session = initiation.noise.finish(&PSK, noise);
        macs.write(&mut message, now);
        let receive = session.initiator_to_responder.into();
        let send = session.responder_to_initiator.into();
        ((send, receive), message)
    }

    /// Ends a handshake that we have begun; gives it back where the response does not fit.
    pub(super) fn finish(&self, sent: Sent, response: &[u8]) -> Result<SessionKeys, Sent> {
        let Ok(mut message) = <[u8; RESPONSE]>::try_from(response) else {
            return Err(sent);
        };
        let noise = &mut message[NOISE_OF_RESPONSE..RESPONSE - MACS];
        let session = sent
            .0
            .try_finish(noise, self.keys.to_x25519_dalek(), &PSK)
            .map_err(Sent)?;
        let send = session.initiator_to_responder.into();
        let receive = session.responder_to_initiator.into();
        Ok((send, receive))
    }

    /// Later than all before it, though the host's clock be set back.
    fn stamp(&mut self) -> Timestamp {
        let mut stamp = tai64n(self.latest.look());
        if stamp <= self.stamped {
            stamp = self.stamped;
            // One step of what the clock is rounded to.
            let (seconds, nanos) = stamp.split_at_mut(8);
            let next = u32::from_be_bytes(nanos.try_into().unwrap_or_default()) + ROUNDED;
            if next < 1_000_000_000 {
                nanos.copy_from_slice(&next.to_be_bytes());
            } else {
                let next = u64::from_be_bytes(seconds.try_into().unwrap_or_default()) + 1;
                seconds.copy_from_slice(&next.to_be_bytes());
                nanos.fill(0);
            }
        }
        self.stamped = stamp;
        stamp
    }

    fn is_under_load(&mut self, now: Instant) -> bool {
        let second = |since: &Instant| now.saturating_duration_since(*since).as_secs() == 0;
        if !self.heard_since.as_ref().is_some_and(second) {
            self.heard_since = Some(now);
            self.heard = 0;
        }
        self.heard = self.heard.saturating_add(1);
        self.heard > RATE
    }

    fn cookie(&mut self, from: IpAddr, now: Instant) -> Mac {
        let young = |since: &Instant| now.saturating_duration_since(*since) < COOKIE_LIFE;
        if !self.secret_since.as_ref().is_some_and(young) {
            self.secret_since = Some(now);
            self.secret = Zeroizing::new(rand::random());
        }
        match from {
            IpAddr::V4(from) => mac(&self.secret[..], &[&from.octets()]),
            IpAddr::V6(from) => mac(&self.secret[..], &[&from.octets()]),
        }
    }
}

/// A handshake that we have begun.
pub struct Sent(ikpsk2::SentHandshake<Timestamp>);

/// What makes the MACs of messages to one peer.
pub struct Macs {
    keys: MacKeys,
    /// Of the message that was sent last, which a cookie answers.
    last: Mac,
    cookie: Option<(Mac, Instant)>,
}

impl Macs {
    pub fn new(peer: &NodePublicKey) -> Self {
        Self {
            keys: MacKeys::new(peer),
            last: [0; 16],
            cookie: None,
        }
    }

    fn write(&mut self, message: &mut [u8], now: Instant) {
        let (rest, macs) = message.split_at_mut(message.len() - MACS);
        let (mac1, mac2) = macs.split_at_mut(MACS / 2);
        self.last = mac(&self.keys.first[..], &[rest]);
        mac1.copy_from_slice(&self.last);
        let fresh = |(_, since): &(Mac, Instant)| now < *since + COOKIE_LIFE;
        if let Some((cookie, _)) = self.cookie.filter(fresh) {
            mac2.copy_from_slice(&mac(&cookie, &[rest, mac1]));
        }
    }

    /// Takes the cookie that a peer wants to see in the next message.
    pub fn take_cookie(&mut self, reply: &[u8], now: Instant) {
        let Ok(reply) = <&[u8; COOKIE]>::try_from(reply) else {
            return;
        };
        let (nonce, sealed) = reply[8..].split_at(24);
        let (cookie, tag) = sealed.split_at(16);
        let Ok(mut cookie) = Mac::try_from(cookie) else {
            return;
        };
        let cipher = XChaCha20Poly1305::new((&*self.keys.cookie).into());
        let opened =
            cipher.decrypt_in_place_detached(nonce.into(), &self.last, &mut cookie, tag.into());
        if opened.is_ok() {
            self.cookie = Some((cookie, now));
        }
    }
}

/// What everybody who knows a node's public key can make MACs with.
struct MacKeys {
    first: Zeroizing<[u8; 32]>,
    cookie: Zeroizing<[u8; 32]>,
}

impl MacKeys {
    fn new(of: &NodePublicKey) -> Self {
        let of = of.to_x25519_dalek();
        let key = |label: &[u8]| {
            Blake2s256::new_with_prefix(label)
                .chain_update(of)
                .finalize()
        };
        Self {
            first: Zeroizing::new(key(b"mac1----").into()),
            cookie: Zeroizing::new(key(b"cookie--").into()),
        }
    }

    /// Tells the sender of a message what to put into the next.
    fn reply(&self, sender: [u8; 4], cookie: &Mac, mac1: &[u8]) -> [u8; COOKIE] {
        let mut reply = [0; COOKIE];
        reply[0] = 3;
        reply[4..8].copy_from_slice(&sender);
        let nonce: [u8; 24] = rand::random();
        reply[8..32].copy_from_slice(&nonce);
        let (sealed, tag) = reply[32..].split_at_mut(16);
        sealed.copy_from_slice(cookie);
        let cipher = XChaCha20Poly1305::new((&*self.cookie).into());
        // It fails on texts of 256 GiB; without a tag the reply says nothing to anyone.
        if let Ok(made) = cipher.encrypt_in_place_detached((&nonce).into(), mac1, sealed) {
            tag.copy_from_slice(&made);
        }
        reply
    }
}

fn split_macs(message: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (rest, macs) = message.split_at_checked(message.len().checked_sub(MACS)?)?;
    let (mac1, mac2) = macs.split_at(MACS / 2);
    (rest.len() >= 8).then_some((rest, mac1, mac2))
}

fn keyed(key: &[u8], parts: &[&[u8]]) -> Blake2sMac<U16> {
    // BLAKE2s takes keys of up to 32 bytes.
    #[expect(clippy::expect_used, reason = "keys have 16 or 32 bytes")]
    let mut mac =
        <Blake2sMac<U16> as KeyInit>::new_from_slice(key).expect("a key of at most 32 bytes");
    for part in parts {
        mac.update(part);
    }
    mac
}

fn mac(key: &[u8], parts: &[&[u8]]) -> Mac {
    keyed(key, parts).finalize().into_bytes().into()
}

/// Compares in constant time.
fn is_mac(key: &[u8], parts: &[&[u8]], claimed: &[u8]) -> bool {
    keyed(key, parts).verify_slice(claimed).is_ok()
}

/// As finely as others shall know our clock: 2^24 ns, as in Linux.
const ROUNDED: u32 = 1 << 24;

/// TAI64N as WireGuard has it: seconds from 2^62 + 10 at the Unix epoch, without leap seconds.
fn tai64n(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut stamp = [0; 12];
    stamp[..8].copy_from_slice(&((1 << 62) + 10 + since.as_secs()).to_be_bytes());
    stamp[8..].copy_from_slice(&(since.subsec_nanos() & !(ROUNDED - 1)).to_be_bytes());
    stamp
}
