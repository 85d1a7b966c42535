//! Many packets of one flow in the shape of one, as the TUN device gives and takes them.
//!
//! A TUN device with `IFF_VNET_HDR` puts a `struct virtio_net_hdr` (linux/virtio_net.h) before each
//! packet. With offloads on, the packet behind it may be a burst: headers once, and the payload of
//! up to 64 KiB, which is to be cut into packets of `gso_size` bytes; and checksums may be left to
//! do. [`Burst`] cuts what the container sends; [`Joiner`] makes bursts of what it receives.

use std::ops::Range;

use crate::packet::{
    IPV4_HEADER as IPV4, IPV6_HEADER as IPV6, TCP_HEADER as TCP, UDP_HEADER as UDP, be16, fold,
    protocol, sum,
    tcp_flags::{ACK, CWR, FIN, PSH},
};

/// The length of a `virtio_net_hdr`.
pub const HEADER: usize = 10;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum holds the pseudo-header's sum alone.
const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`: the first packet carries CWR.
const GSO_ECN: u8 = 0x80;

/// Where the checksum is within the transport header.
const TCP_SUM: usize = 16;
const UDP_SUM: usize = 6;

/// The most that an IP packet, and so a burst, can hold.
const PACKET_MAX: usize = 65_535;
/// Packets in a burst that is made here: as many datagrams as all kernels take as one
/// (UDP_MAX_SEGMENTS in linux/udp.h, before it grew).
pub const PIECES_MAX: usize = 64;

/// A `virtio_net_hdr`; the default is that of one whole packet with its checksums done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    flags: u8,
    gso_type: u8,
    header_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Header {
    /// Reads one; its numbers are in the machine's own byte order.
    pub fn from_bytes(bytes: [u8; HEADER]) -> Self {
        let [flags, gso_type, a, b, c, d, e, f, g, h] = bytes;
        Self {
            flags,
            gso_type,
            header_len: u16::from_ne_bytes([a, b]),
            gso_size: u16::from_ne_bytes([c, d]),
            csum_start: u16::from_ne_bytes([e, f]),
            csum_offset: u16::from_ne_bytes([g, h]),
        }
    }

    /// The bytes that go before the packet.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let [a, b] = self.header_len.to_ne_bytes();
        let [c, d] = self.gso_size.to_ne_bytes();
        let [e, f] = self.csum_start.to_ne_bytes();
        let [g, h] = self.csum_offset.to_ne_bytes();
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h]
    }

    /// Whether the packet is a burst.
    pub fn is_burst(self) -> bool {
        self.gso_type & !GSO_ECN != GSO_NONE
    }

    /// Whether the packet is a burst of UDP's, which older kernels do not take.
    pub fn is_udp_burst(self) -> bool {
        self.gso_type & !GSO_ECN == GSO_UDP
    }
}

/// Why a packet from the device cannot be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the packet does not fit its virtio header")]
pub struct Misfit;

/// What the container sent at once: one packet, or many of one flow.
#[derive(Debug)]
pub struct Burst<'a> {
    header: Header,
    bytes: &'a [u8],
    cut: Option<Cut>,
}

/// How to cut a burst.
#[derive(Clone, Copy, Debug)]
struct Cut {
    /// Where the transport header begins, and where the payload.
    transport: usize,
    payload: usize,
    /// Bytes of payload a packet.
    size: usize,
    udp: bool,
}

impl<'a> Burst<'a> {
    /// One packet with its checksums done.
    pub fn whole(bytes: &'a [u8]) -> Self {
        Self {
            header: Header::default(),
            bytes,
            cut: None,
        }
    }

    /// Checks a packet against its header, and does the checksum of one that is no burst.
    pub fn new(header: Header, bytes: &'a mut [u8]) -> Result<Self, Misfit> {
        let start = usize::from(header.csum_start);
        if !header.is_burst() {
            if header.flags & NEEDS_CSUM != 0 {
                finish_sum(bytes, start, usize::from(header.csum_offset)).ok_or(Misfit)?;
            }
            return Ok(Self::whole(bytes));
        }
        let cut = Cut::new(header, bytes, start).ok_or(Misfit)?;
        Ok(Self {
            header,
            bytes,
            cut: Some(cut),
        })
    }

    /// All of it, as one packet: its headers are those of every packet in it.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// What goes before the bytes when they are handed to a device as they are.
    pub fn header(&self) -> Header {
        self.header
    }

    /// Hands each packet to `take`, in order and with its checksums done. `scratch` is where they
    /// are made.
    pub fn packets(&self, scratch: &mut Vec<u8>, mut take: impl FnMut(&[u8])) {
        let Some(cut) = self.cut else {
            return take(self.bytes);
        };
        for number in 0..cut.count(self.bytes) {
            scratch.resize(cut.len(self.bytes, number), 0);
            cut.make(self.bytes, number, scratch);
            take(scratch);
        }
    }

    /// How many bytes all packets need, each with `around` more.
    pub fn room(&self, around: usize) -> usize {
        let Some(cut) = self.cut else {
            return self.bytes.len() + around;
        };
        let count = cut.count(self.bytes);
        self.bytes.len() + (count - 1) * cut.payload + count * around
    }

    /// Puts all packets into `bytes`, one behind the other and with `before` and `after` bytes of
    /// room around each, and hands `take` where each lies, with its room.
    pub fn spread(
        &self,
        bytes: &mut [u8],
        before: usize,
        after: usize,
        mut take: impl FnMut(Range<usize>),
    ) {
        let Some(cut) = self.cut else {
            let end = before + self.bytes.len();
            bytes[before..end].copy_from_slice(self.bytes);
            return take(0..end + after);
        };
        let mut start = 0;
        for number in 0..cut.count(self.bytes) {
            let end = start + before + cut.len(self.bytes, number);
            cut.make(self.bytes, number, &mut bytes[start + before..end]);
            take(start..end + after);
            start = end + after;
        }
    }
}

impl Cut {
    fn new(header: Header, bytes: &[u8], transport: usize) -> Option<Self> {
        let v4 = version(bytes)? == 4;
        let kind = header.gso_type & !GSO_ECN;
        let udp = kind == GSO_UDP;
        let protocol = if udp { protocol::UDP } else { protocol::TCP };
        let fits = match (v4, kind) {
            (true, GSO_TCPV4 | GSO_UDP) => {
                transport == usize::from(bytes[0] & 0x0f) * 4
                    && transport >= IPV4
                    && bytes.get(9) == Some(&protocol)
            }
            // Behind IPv6's header there may be extensions.
            (false, GSO_TCPV6 | GSO_UDP) => transport >= IPV6,
            _ => false,
        };
        let payload = transport
            + if udp {
                UDP
            } else {
                usize::from(bytes.get(transport + 12)? >> 4) * 4
            };
        let size = usize::from(header.gso_size);
        let whole = payload >= transport + if udp { UDP } else { TCP } && payload < bytes.len();
        (fits && whole && size != 0).then_some(Self {
            transport,
            payload,
            size,
            udp,
        })
    }

    /// How many packets it makes.
    fn count(self, bytes: &[u8]) -> usize {
        (bytes.len() - self.payload).div_ceil(self.size)
    }

    /// How long the packet `number` is.
    fn len(self, bytes: &[u8], number: usize) -> usize {
        self.payload + (bytes.len() - self.payload - number * self.size).min(self.size)
    }

    /// Makes the packet `number`, which is as long as `packet`.
    fn make(self, bytes: &[u8], number: usize, packet: &mut [u8]) {
        let Self {
            transport,
            payload,
            size,
            udp,
        } = self;
        let (headers, data) = bytes.split_at(payload);
        let (new_headers, piece) = packet.split_at_mut(payload);
        new_headers.copy_from_slice(headers);
        piece.copy_from_slice(&data[number * size..][..piece.len()]);
        if headers[0] >> 4 == 4 {
            put16(packet, 4, be16(headers, 4).wrapping_add(number as u16));
        }
        set_length(packet, transport);
        let sum_at = if udp {
            put16(packet, transport + 4, (packet.len() - transport) as u16);
            transport + UDP_SUM
        } else {
            let first = be32(headers, transport + 4);
            let sequence = first.wrapping_add((number * size) as u32);
            packet[transport + 4..transport + 8].copy_from_slice(&sequence.to_be_bytes());
            let flags = &mut packet[transport + 13];
            if (number + 1) * size < data.len() {
                *flags &= !(FIN | PSH);
            }
            if number != 0 {
                *flags &= !CWR;
            }
            transport + TCP_SUM
        };
        put16(packet, sum_at, 0);
        let protocol = if udp { protocol::UDP } else { protocol::TCP };
        let pseudo = pseudo(packet, protocol, packet.len() - transport);
        let sum = sum(pseudo, &packet[transport..]);
        packet[sum_at..sum_at + 2].copy_from_slice(&checksum(sum, udp).to_be_bytes());
    }
}

/// Joins packets that follow one another in their flow, so that the container takes them as one.
///
/// Only packets whose checksums are right are joined, for what they become has a new one.
#[derive(Debug, Default)]
pub struct Joiner {
    bursts: Vec<Joined>,
    pieces: Vec<Range<usize>>,
    /// For every piece, the one that follows it in its burst.
    next: Vec<Option<usize>>,
    /// Where the parts of a burst are put together.
    parts: Vec<Range<usize>>,
}

/// A packet, or several that became one, among a joiner's.
#[derive(Debug)]
struct Joined {
    /// Its pieces: packets, of which only the payload of all but the first counts.
    first: usize,
    last: usize,
    count: usize,
    len: usize,
    /// `None`: nothing may be joined to it.
    shape: Option<Shape>,
    /// Its last packet was shorter, or asked to be handed on at once.
    closed: bool,
}

/// What a packet must be like to be joined to others.
#[derive(Clone, Copy, Debug)]
struct Shape {
    transport: usize,
    payload: usize,
    size: usize,
    udp: bool,
    /// There is data in it and nothing else that counts, and its checksum is right.
    joins: bool,
}

impl Joiner {
    /// Takes the packet at `range` of `bytes`; the same `bytes` must be given until
    /// [`Joiner::drain`]. `udp`: whether datagrams may be joined too.
    pub fn push(&mut self, bytes: &mut [u8], range: Range<usize>, udp: bool) {
        let shape = Shape::of(&bytes[range.clone()]).filter(|shape| udp || !shape.udp);
        let piece = self.pieces.len();
        self.pieces.push(range.clone());
        self.next.push(None);
        if let Some(shape) = shape
            && self.append(bytes, &range, shape, piece)
        {
            return;
        }
        self.bursts.push(Joined {
            first: piece,
            last: piece,
            count: 1,
            len: range.len(),
            shape,
            closed: shape.is_none_or(|shape| {
                !shape.joins || !shape.udp && is_pushed(&bytes[range.clone()], shape)
            }),
        });
    }

    /// Adds the piece to the latest burst of its flow, if it follows.
    fn append(
        &mut self,
        bytes: &mut [u8],
        range: &Range<usize>,
        shape: Shape,
        piece: usize,
    ) -> bool {
        let packet = &bytes[range.clone()];
        let same_flow = |burst: &&mut Joined| {
            burst.shape.is_some_and(|other| {
                other.transport == shape.transport
                    && other.udp == shape.udp
                    && is_same_flow(&bytes[self.pieces[burst.first].clone()], packet, shape)
            })
        };
        let Some(burst) = self.bursts.iter_mut().rev().find(same_flow) else {
            return false;
        };
        let Some(first) = burst.shape else {
            return false;
        };
        let head = &bytes[self.pieces[burst.first].clone()];
        let fits = shape.joins
            && !burst.closed
            && shape.payload == first.payload
            && shape.size <= first.size
            && burst.len + shape.size <= PACKET_MAX
            && burst.count < PIECES_MAX
            && is_alike(head, packet, burst.count, burst.len, first);
        if !fits {
            return false;
        }
        let pushed = !shape.udp && is_pushed(packet, shape);
        burst.closed = shape.size < first.size || pushed;
        burst.len += shape.size;
        burst.count += 1;
        self.next[burst.last] = Some(piece);
        burst.last = piece;
        if pushed {
            let head = &mut bytes[self.pieces[burst.first].clone()];
            head[shape.transport + 13] |= PSH;
        }
        true
    }

    /// Hands over all packets and bursts: the header of each, and its parts in `bytes`, at most
    /// [`PIECES_MAX`]. Empties the joiner.
    pub fn drain<E>(
        &mut self,
        bytes: &mut [u8],
        mut take: impl FnMut(Header, &[u8], &[Range<usize>]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut result = Ok(());
        let parts = &mut self.parts;
        for burst in self.bursts.drain(..) {
            let head = self.pieces[burst.first].clone();
            parts.clear();
            parts.push(head.clone());
            let header = match burst.shape {
                Some(shape) if burst.count > 1 => {
                    let mut next = self.next[burst.first];
                    while let Some(piece) = next {
                        let range = self.pieces[piece].clone();
                        parts.push(range.start + shape.payload..range.end);
                        next = self.next[piece];
                    }
                    shape.lead(&mut bytes[head], burst.len)
                }
                _ => Header::default(),
            };
            result = take(header, bytes, parts);
            if result.is_err() {
                break;
            }
        }
        self.bursts.clear();
        self.pieces.clear();
        self.next.clear();
        result
    }
}

impl Shape {
    /// `None` for what is neither TCP nor UDP, or has anything unusual in its headers.
    fn of(packet: &[u8]) -> Option<Self> {
        let v4 = version(packet)? == 4;
        let (transport, protocol, len) = if v4 {
            // No options and no fragment.
            let plain = packet[0] == 0x45 && packet[6] & 0x3f == 0 && packet[7] == 0;
            plain.then(|| (IPV4, packet[9], usize::from(be16(packet, 2))))?
        } else {
            (IPV6, packet[6], IPV6 + usize::from(be16(packet, 4)))
        };
        let udp = match protocol {
            protocol::TCP => false,
            protocol::UDP => true,
            _ => return None,
        };
        let rest = packet.len().checked_sub(transport)?;
        if len != packet.len() || rest < if udp { UDP } else { TCP } {
            return None;
        }
        let payload = transport
            + if udp {
                UDP
            } else {
                usize::from(packet[transport + 12] >> 4) * 4
            };
        if payload < transport + if udp { UDP } else { TCP } || payload > packet.len() {
            return None;
        }
        let plain = if udp {
            // A sum of 0 says that there is none.
            usize::from(be16(packet, transport + 4)) == rest && be16(packet, transport + 6) != 0
        } else {
            packet[transport + 13] & !PSH == ACK
        };
        let joins = plain
            && payload < packet.len()
            && (!v4 || fold(sum(0, &packet[..IPV4])) == u16::MAX)
            && fold(sum(pseudo(packet, protocol, rest), &packet[transport..])) == u16::MAX;
        Some(Self {
            transport,
            payload,
            size: packet.len() - payload,
            udp,
            joins,
        })
    }

    /// Makes the first packet's headers those of a burst of `len` bytes.
    fn lead(self, head: &mut [u8], len: usize) -> Header {
        let (protocol, sum_at) = if self.udp {
            put16(head, self.transport + 4, (len - self.transport) as u16);
            (protocol::UDP, UDP_SUM)
        } else {
            (protocol::TCP, TCP_SUM)
        };
        set_length_to(head, self.transport, len);
        let sum = fold(pseudo(head, protocol, len - self.transport));
        let at = self.transport + sum_at;
        head[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        Header {
            flags: NEEDS_CSUM,
            gso_type: match (self.udp, head[0] >> 4) {
                (true, _) => GSO_UDP,
                (false, 4) => GSO_TCPV4,
                (false, _) => GSO_TCPV6,
            },
            header_len: self.payload as u16,
            gso_size: self.size as u16,
            csum_start: self.transport as u16,
            csum_offset: sum_at as u16,
        }
    }
}

/// Whether two packets with the same place for the transport header have the same addresses,
/// protocol and ports.
fn is_same_flow(one: &[u8], other: &[u8], shape: Shape) -> bool {
    let ports = shape.transport..shape.transport + 4;
    // Of lengths that the compiler knows.
    one[0] >> 4 == other[0] >> 4
        && match shape.transport {
            IPV4 => one[12..20] == other[12..20],
            _ => one[8..40] == other[8..40],
        }
        && one[ports.clone()] == other[ports]
}

/// Whether the headers of `packet`, which would be number `count` of a burst that is `len` bytes
/// long and begins with `head`, say nothing that the burst's do not.
fn is_alike(head: &[u8], packet: &[u8], count: usize, len: usize, shape: Shape) -> bool {
    let t = shape.transport;
    let same = |range: Range<usize>| head[range.clone()] == packet[range];
    let network = if t == IPV4 {
        // Class, flags and lifetime. The number of an unfragmentable packet means nothing.
        let id = be16(head, 4).wrapping_add(count as u16);
        same(1..2) && same(6..9) && (packet[6] & 0x40 != 0 || be16(packet, 4) == id)
    } else {
        same(0..4) && same(6..8)
    };
    let transport = shape.udp || {
        let sequence = be32(head, t + 4).wrapping_add((len - shape.payload) as u32);
        // Acknowledgement, window and options.
        be32(packet, t + 4) == sequence
            && same(t + 8..t + 13)
            && same(t + 14..t + 16)
            && same(t + TCP..shape.payload)
    };
    network && transport
}

fn is_pushed(packet: &[u8], shape: Shape) -> bool {
    packet[shape.transport + 13] & PSH != 0
}

/// The IP version, of a packet that is at least as long as its fixed header.
fn version(packet: &[u8]) -> Option<u8> {
    match packet.first()? >> 4 {
        4 if packet.len() >= IPV4 => Some(4),
        6 if packet.len() >= IPV6 => Some(6),
        _ => None,
    }
}

/// Completes a checksum that holds the pseudo-header's sum.
fn finish_sum(packet: &mut [u8], start: usize, offset: usize) -> Option<()> {
    let covered = packet.get(start..)?;
    if offset + 2 > covered.len() {
        return None;
    }
    let sum = checksum(sum(0, covered), offset == UDP_SUM);
    packet[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
    Some(())
}

fn set_length(packet: &mut [u8], transport: usize) {
    set_length_to(packet, transport, packet.len());
}

fn set_length_to(packet: &mut [u8], transport: usize, len: usize) {
    if packet[0] >> 4 == 4 {
        put16(packet, 2, len as u16);
        put16(packet, 10, 0);
        let sum = !fold(sum(0, &packet[..transport]));
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        put16(packet, 4, (len - IPV6) as u16);
    }
}

/// The sum of the pseudo-header (RFC 9293, section 3.1; RFC 8200, section 8.1).
fn pseudo(packet: &[u8], protocol: u8, transport_len: usize) -> u64 {
    let addresses = if packet[0] >> 4 == 4 {
        &packet[12..20]
    } else {
        &packet[8..40]
    };
    let total = sum(sum(0, &[0, protocol]), addresses);
    sum(total, &(transport_len as u16).to_be_bytes())
}

/// What goes into a checksum field; UDP's 0 would say that there is none.
fn checksum(sum: u64, udp: bool) -> u16 {
    match !fold(sum) {
        0 if udp => u16::MAX,
        sum => sum,
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A TCP or UDP packet with right checksums.
    fn packet(v6: bool, udp: bool, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = if v6 {
            let mut ip = vec![0x60, 0, 0, 0, 0, 0, if udp { 17 } else { 6 }, 64];
            ip.extend([[0xfd; 16], [0xfe; 16]].concat());
            ip
        } else {
            let protocol = if udp { 17 } else { 6 };
            let ip = [0x45, 0, 0, 0, 0, 7, 0x40, 0, 64, protocol, 0, 0];
            [&ip[..], &[100, 64, 0, 1], &[100, 64, 0, 2]].concat()
        };
        let transport = bytes.len();
        bytes.extend([0x12, 0x34, 0, 80]);
        if udp {
            bytes.extend(((UDP + payload.len()) as u16).to_be_bytes());
            bytes.extend([0, 0]);
        } else {
            bytes.extend(sequence.to_be_bytes());
            bytes.extend([0, 0, 0, 9, 0x80, flags, 1, 0, 0, 0, 0, 0]);
            bytes.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        }
        bytes.extend(payload);
        set_length(&mut bytes, transport);
        let (protocol, at) = if udp { (17, UDP_SUM) } else { (6, TCP_SUM) };
        let pseudo = pseudo(&bytes, protocol, bytes.len() - transport);
        let total = sum(pseudo, &bytes[transport..]);
        bytes[transport + at..transport + at + 2]
            .copy_from_slice(&checksum(total, udp).to_be_bytes());
        bytes
    }

    /// What comes out of a joiner for these packets: headers, and packets put together.
    fn join(packets: &[Vec<u8>]) -> Vec<(Header, Vec<u8>)> {
        let (mut bytes, mut joiner) = (packets.concat(), Joiner::default());
        let mut at = 0;
        for packet in packets {
            joiner.push(&mut bytes, at..at + packet.len(), true);
            at += packet.len();
        }
        let mut joined = Vec::new();
        let taken = joiner.drain(&mut bytes, |header, bytes, parts| {
            let parts: Vec<_> = parts.iter().map(|part| &bytes[part.clone()]).collect();
            joined.push((header, parts.concat()));
            Ok::<_, ()>(())
        });
        assert_eq!(taken, Ok(()));
        joined
    }

    fn cut(header: Header, mut bytes: Vec<u8>) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        let burst = Burst::new(header, &mut bytes).unwrap();
        burst.packets(&mut Vec::new(), |packet| packets.push(packet.to_vec()));
        packets
    }

    /// Consecutive packets of one flow: all but the last of one size.
    fn flow(v6: bool, udp: bool, size: usize, count: usize, last: usize) -> Vec<Vec<u8>> {
        let mut packets: Vec<_> = (0..count)
            .map(|number| {
                let len = if number + 1 == count { last } else { size };
                let payload: Vec<u8> = (0..len).map(|at| (at * 7 + number) as u8).collect();
                let end = number + 1 == count;
                let flags = if end { ACK | PSH } else { ACK };
                packet(v6, udp, 1000 + (number * size) as u32, flags, &payload)
            })
            .collect();
        if !v6 {
            for (number, packet) in packets.iter_mut().enumerate() {
                put16(packet, 4, 7 + number as u16);
                set_length(packet, IPV4);
            }
        }
        packets
    }

    #[test]
    fn checksums_of_whole_packets_are_finished() {
        for (v6, udp) in [(false, false), (false, true), (true, false), (true, true)] {
            let whole = packet(v6, udp, 1, ACK, b"some data");
            let transport = if v6 { IPV6 } else { IPV4 };
            let (protocol, offset) = if udp { (17, UDP_SUM) } else { (6, TCP_SUM) };
            let mut unfinished = whole.clone();
            let partial = fold(pseudo(&whole, protocol, whole.len() - transport));
            unfinished[transport + offset..transport + offset + 2]
                .copy_from_slice(&partial.to_be_bytes());
            let header = Header {
                flags: NEEDS_CSUM,
                csum_start: transport as u16,
                csum_offset: offset as u16,
                ..Header::default()
            };
            assert_eq!(cut(header, unfinished), [whole]);
        }
    }

    #[test]
    fn what_does_not_follow_is_not_joined() {
        let base = flow(false, false, 100, 3, 100);
        let alone = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut packets = base.clone();
            packets[1][IPV4 + 13] = ACK;
            change(&mut packets[1]);
            // Right sums, so that nothing but the change decides.
            let rest = packets[1].len() - IPV4;
            set_length(&mut packets[1], IPV4);
            put16(&mut packets[1], IPV4 + TCP_SUM, 0);
            let total = sum(pseudo(&packets[1], 6, rest), &packets[1][IPV4..]);
            packets[1][IPV4 + TCP_SUM..IPV4 + TCP_SUM + 2]
                .copy_from_slice(&checksum(total, false).to_be_bytes());
            join(&packets).len()
        };
        assert_eq!(alone(&|_| {}), 1);
        assert_eq!(alone(&|packet| packet[1] = 3), 3, "another class");
        assert_eq!(alone(&|packet| packet[8] = 63), 3, "another lifetime");
        assert_eq!(alone(&|packet| packet[IPV4 + 7] ^= 1), 3, "a gap");
        assert_eq!(alone(&|packet| packet[IPV4 + 11] ^= 1), 3, "another ack");
        assert_eq!(alone(&|packet| packet[IPV4 + 15] ^= 1), 3, "another window");
        assert_eq!(alone(&|packet| packet[IPV4 + 27] ^= 1), 3, "another option");
        assert_eq!(alone(&|packet| packet[IPV4 + 13] |= FIN), 3, "an end");
        assert_eq!(alone(&|packet| packet[IPV4 + 13] |= PSH), 2, "a push");
        assert_eq!(alone(&|packet| packet[IPV4 + 3] ^= 1), 3, "another port");
        assert_eq!(alone(&|packet| packet[15] ^= 1), 3, "another source");
    }

    #[test]
    fn wrong_checksums_stay_wrong() {
        for at in [10, IPV4 + TCP_SUM, 60] {
            let mut packets = flow(false, false, 100, 3, 100);
            packets[1][at] ^= 1;
            let joined = join(&packets);
            assert_eq!(joined[1], (Header::default(), packets[1].clone()));
        }
    }

    #[test]
    fn flows_that_alternate_are_joined_and_keep_their_order() {
        let one = flow(false, false, 100, 4, 50);
        let other = flow(true, false, 200, 4, 200);
        let ack = packet(false, false, 1, ACK, b"");
        let mixed: Vec<_> = one
            .iter()
            .zip(&other)
            .flat_map(|(one, other)| [one.clone(), other.clone(), ack.clone()])
            .collect();
        // The bare acknowledgement is of the first flow: what comes after stays after it.
        let joined = join(&mixed);
        let cuts: Vec<_> = joined
            .into_iter()
            .flat_map(|(header, bytes)| cut(header, bytes))
            .collect();
        let of = |flow: u8| cuts.iter().filter(move |packet| packet[0] >> 4 == flow);
        assert!(of(6).eq(other.iter()));
        assert!(of(4).eq(mixed.iter().filter(|packet| packet[0] >> 4 == 4)));
    }

    proptest! {
        #[test]
        fn what_was_joined_is_cut_into_the_same(
            v6: bool, udp: bool, size in 1..1400usize, count in 2..40usize, short in 0..1400usize,
        ) {
            let last = size - short % size;
            let packets = flow(v6, udp, size, count, last);
            let joined = join(&packets);
            prop_assert_eq!(joined.len(), 1);
            let (header, bytes) = joined.into_iter().next().unwrap();
            prop_assert!(header.is_burst());
            prop_assert_eq!(Header::from_bytes(header.to_bytes()), header);
            prop_assert_eq!(cut(header, bytes), packets);
        }

        #[test]
        fn no_packets_panic(
            packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 0..8),
        ) {
            let joined = join(&packets);
            prop_assert_eq!(joined.len(), packets.len());
        }

        #[test]
        fn no_burst_panics(
            header: [u8; HEADER], start in 0..80u16, size in 0..200u16, gso in 0..6u8,
            v6: bool, mut bytes in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            if let Some(first) = bytes.first_mut() {
                *first = if v6 { 0x60 } else { 0x45 };
            }
            let header = Header {
                gso_type: gso, csum_start: start, gso_size: size, ..Header::from_bytes(header)
            };
            if let Ok(burst) = Burst::new(header, &mut bytes) {
                let mut total = 0;
                burst.packets(&mut Vec::new(), |packet| total += packet.len());
                prop_assert!(total >= burst.bytes().len());
            }
        }
    }
}
