//! One pair of keys, and the packets under it.

use std::{ops::Range, time::Instant};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroizing;

#[cfg(target_arch = "x86_64")]
use super::wide;
use super::{HEADER, TAG, window::Window};

/// Packets of one length that are worth sealing or opening side by side: below this, `ring` is
/// quicker one by one.
#[cfg(target_arch = "x86_64")]
const WORTH: usize = 8;
/// How many packets are looked at together.
const LANES: usize = 16;

/// What two nodes agreed on in one handshake.
pub struct Session {
    /// By which index each side knows it.
    pub local: u32,
    pub remote: u32,
    /// Whether this side began the handshake; it is the one to renew it.
    pub is_initiator: bool,
    pub since: Instant,
    send: Key,
    receive: Key,
    sent: u64,
    received: Window,
}

impl Session {
    pub fn new(
        (local, remote): (u32, u32),
        is_initiator: bool,
        (send, receive): ([u8; 32], [u8; 32]),
        since: Instant,
    ) -> Self {
        Self {
            local,
            remote,
            is_initiator,
            since,
            send: Key::new(send),
            receive: Key::new(receive),
            sent: 0,
            received: Window::default(),
        }
    }

    /// How many packets were sealed.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Makes datagrams of packets: each range of `bytes` is one datagram, with the packet between
    /// room for its header and its tag.
    pub fn seal(&mut self, bytes: &mut [u8], datagrams: &[Range<usize>]) {
        for range in datagrams {
            let header = &mut bytes[range.start..range.start + HEADER];
            header[..4].copy_from_slice(&4u32.to_le_bytes());
            header[4..8].copy_from_slice(&self.remote.to_le_bytes());
            header[8..].copy_from_slice(&self.sent.to_le_bytes());
            self.sent += 1;
        }
        let mut counter = self.sent - datagrams.len() as u64;
        for run in datagrams.chunk_by(|a, b| a.len() == b.len()) {
            for run in run.chunks(LANES) {
                self.send.seal(counter, bytes, run);
                counter += run.len() as u64;
            }
        }
    }

    /// Opens a train of datagrams of this session, `size` bytes each; the last may be shorter. The
    /// packets are put into `plain` one behind the other, which has as much room as the train; `take`
    /// is told where those are that are authentic and new. Others leave a gap.
    pub fn open(
        &mut self,
        train: &[u8],
        size: usize,
        plain: &mut [u8],
        mut take: impl FnMut(Range<usize>),
    ) {
        let mut put = 0;
        for (number, chunk) in train.chunks(size * LANES).enumerate() {
            let from = number * size * LANES;
            let mut counters = [0; LANES];
            let mut packets: [Range<usize>; LANES] = Default::default();
            let mut used = 0;
            for (nth, datagram) in chunk.chunks(size).enumerate() {
                let Some(counter) = counter(datagram) else {
                    continue;
                };
                if self.received.may_be_new(counter) {
                    counters[used] = counter;
                    let start = from + nth * size;
                    packets[used] = start + HEADER..start + datagram.len();
                    used += 1;
                }
            }
            let mut rest = &packets[..used];
            let mut counters = &counters[..used];
            while let Some(first) = rest.first() {
                let alike = rest.iter().take_while(|other| other.len() == first.len());
                let run;
                (run, rest) = rest.split_at(alike.count());
                let run_counters;
                (run_counters, counters) = counters.split_at(run.len());
                let authentic = self
                    .receive
                    .open(run_counters, train, run, &mut plain[put..]);
                let len = run[0].len() - TAG;
                for (nth, &counter) in run_counters.iter().enumerate() {
                    if authentic & 1 << nth != 0 && self.received.take(counter) {
                        take(put + nth * len..put + (nth + 1) * len);
                    }
                }
                put += run.len() * len;
            }
        }
    }
}

fn counter(datagram: &[u8]) -> Option<u64> {
    // Only the last of a train may be too short to be one.
    let is_whole = datagram.len() >= HEADER + TAG;
    let bytes = is_whole.then(|| datagram[8..].first_chunk())??;
    Some(u64::from_le_bytes(*bytes))
}

/// ChaCha20-Poly1305 with one key; a packet's counter is its nonce.
struct Key {
    single: LessSafeKey,
    #[cfg(target_arch = "x86_64")]
    wide: Option<wide::Key>,
}

impl Key {
    fn new(bytes: [u8; 32]) -> Self {
        let bytes = Zeroizing::new(bytes);
        // It takes every key of this length.
        #[expect(clippy::expect_used, reason = "32 bytes are a key")]
        let single = UnboundKey::new(&CHACHA20_POLY1305, &*bytes).expect("a key of 32 bytes");
        Self {
            single: LessSafeKey::new(single),
            #[cfg(target_arch = "x86_64")]
            wide: wide::Key::new(&bytes),
        }
    }

    /// Seals at most [`LANES`] packets of one length; the first has the nonce `counter`.
    fn seal(&self, counter: u64, bytes: &mut [u8], datagrams: &[Range<usize>]) {
        #[cfg(target_arch = "x86_64")]
        if let Some(wide) = &self.wide
            && datagrams.len() >= WORTH
        {
            return wide.seal(counter, bytes, datagrams);
        }
        for (nth, range) in datagrams.iter().enumerate() {
            let packet = &mut bytes[range.start + HEADER..range.end];
            let (text, tag) = packet.split_at_mut(packet.len() - TAG);
            let nonce = nonce(counter + nth as u64);
            let sealed = self
                .single
                .seal_in_place_separate_tag(nonce, Aad::empty(), text);
            match sealed {
                Ok(made) => tag.copy_from_slice(made.as_ref()),
                // Longer than ring can count (256 GiB): nobody is to read it.
                Err(ring::error::Unspecified) => packet.fill(0),
            }
        }
    }

    /// Opens at most [`LANES`] packets of one length with their tags into `plain`, one behind the
    /// other. Returns a bit for each that is authentic.
    fn open(
        &self,
        counters: &[u64],
        sealed: &[u8],
        packets: &[Range<usize>],
        plain: &mut [u8],
    ) -> u32 {
        #[cfg(target_arch = "x86_64")]
        if let Some(wide) = &self.wide
            && packets.len() >= WORTH
        {
            return wide.open(counters, sealed, packets, plain);
        }
        let mut authentic = 0;
        for (nth, (range, &counter)) in packets.iter().zip(counters).enumerate() {
            let len = range.len();
            // ring opens in place, tag and all: the next packet is put over this one's tag.
            let room = &mut plain[nth * (len - TAG)..][..len];
            room.copy_from_slice(&sealed[range.clone()]);
            let opened = self
                .single
                .open_in_place(nonce(counter), Aad::empty(), room);
            authentic |= u32::from(opened.is_ok()) << nth;
        }
        authentic
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What ring makes of a packet.
    fn sealed(key: [u8; 32], counter: u64, packet: &[u8]) -> Vec<u8> {
        let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &key).unwrap());
        let mut text = packet.to_vec();
        key.seal_in_place_append_tag(nonce(counter), Aad::empty(), &mut text)
            .unwrap();
        text
    }

    #[test]
    fn many_at_once_are_what_each_alone_would_be() {
        // All ones make the most carries.
        for (fill, key) in [
            (None, rand::random()),
            (Some(0xff), [0xff; 32]),
            (None, [0; 32]),
        ] {
            let both = Key::new(key);
            for len in (0..=200).chain([255, 256, 257, 1279, 1280, 1281, 1500, 9000, 65_000]) {
                let used = 1 + len % LANES;
                let room = HEADER + len + TAG;
                let mut bytes = vec![0; used * room];
                for byte in &mut bytes {
                    *byte = fill.unwrap_or_else(rand::random);
                }
                let packets = bytes.clone();
                let datagrams: Vec<_> = (0..used).map(|at| at * room..(at + 1) * room).collect();
                let counter = u64::from(u32::MAX) - 3;
                both.seal(counter, &mut bytes, &datagrams);
                for (nth, range) in datagrams.iter().enumerate() {
                    let packet = &packets[range.clone()];
                    let alone = sealed(key, counter + nth as u64, &packet[HEADER..HEADER + len]);
                    let (header, sealed) = bytes[range.clone()].split_at(HEADER);
                    assert_eq!(header, &packet[..HEADER]);
                    assert_eq!(sealed, alone, "packet {nth} of {used} of {len} bytes");
                }
                let counters: Vec<_> = (0..used as u64).map(|nth| counter + nth).collect();
                let places: Vec<_> = datagrams.iter().map(|d| d.start + HEADER..d.end).collect();
                let mut plain = vec![0; used * room];
                let all = u32::MAX >> (32 - used);
                assert_eq!(both.open(&counters, &bytes, &places, &mut plain), all);
                for (nth, range) in places.iter().enumerate() {
                    let packet = &packets[range.start..range.end - TAG];
                    assert_eq!(packet, &plain[nth * len..][..len]);
                }
            }
        }
    }

    #[test]
    fn every_bit_counts() {
        const LEN: usize = 70;
        let key = Key::new(rand::random());
        let room = HEADER + LEN + TAG;
        let mut bytes = vec![7; LANES * room];
        let datagrams: Vec<_> = (0..LANES).map(|at| at * room..(at + 1) * room).collect();
        key.seal(5, &mut bytes, &datagrams);
        let counters: Vec<_> = (5..5 + LANES as u64).collect();
        let sealed: Vec<_> = datagrams.iter().map(|d| d.start + HEADER..d.end).collect();
        let mut plain = vec![0; LANES * room];
        for bit in 0..8 * (LEN + TAG) {
            let lane = bit % LANES;
            let at = sealed[lane].start + bit / 8;
            bytes[at] ^= 1 << (bit % 8);
            let authentic = key.open(&counters, &bytes, &sealed, &mut plain);
            assert_eq!(authentic, 0xffff & !(1 << lane), "bit {bit} of lane {lane}");
            bytes[at] ^= 1 << (bit % 8);
        }
        let mut wrong = counters.clone();
        wrong[3] += 1;
        let authentic = key.open(&wrong, &bytes, &sealed, &mut plain);
        assert_eq!(
            authentic,
            0xffff & !(1 << 3),
            "another counter is another nonce"
        );
    }

    #[test]
    fn a_train_is_opened_once_and_what_is_damaged_left_out() {
        let (there, back): ([u8; 32], [u8; 32]) = (rand::random(), rand::random());
        let now = Instant::now();
        let mut near = Session::new((1, 2), true, (there, back), now);
        let mut far = Session::new((2, 1), false, (back, there), now);
        // 40 of one length, and a shorter one at the end.
        let (mut bytes, mut datagrams) = (Vec::new(), Vec::new());
        for number in 0..41u8 {
            let start = bytes.len();
            let len = if number == 40 { 30 } else { 100 };
            bytes.resize(start + HEADER, 0);
            bytes.resize(start + HEADER + len, number);
            bytes.resize(start + HEADER + len + TAG, 0);
            datagrams.push(start..bytes.len());
        }
        near.seal(&mut bytes, &datagrams);
        bytes[datagrams[17].start + 20] ^= 1;
        let mut plain = vec![0; bytes.len()];
        let mut taken = Vec::new();
        far.open(&bytes, 132, &mut plain, |range| taken.push(range));
        let numbers: Vec<_> = taken.iter().map(|range| plain[range.start]).collect();
        let wanted: Vec<_> = (0..41).filter(|&number| number != 17).collect();
        assert_eq!(numbers, wanted);
        for range in &taken {
            let packet = &plain[range.clone()];
            assert!(packet.iter().all(|&byte| byte == packet[0]));
        }
        assert_eq!(taken.last().unwrap().len(), 30);
        bytes[datagrams[17].start + 20] ^= 1;
        let mut again = 0;
        far.open(&bytes, 132, &mut plain, |_| again += 1);
        assert_eq!(again, 1, "only the one that was damaged is new");
    }
}
