//! A read-only view of an IP packet, and the few packets that the node writes itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// IP protocol numbers (IANA, "Assigned Internet Protocol Numbers").
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// "Any private encryption scheme": what Tailscale nodes tell each other (net/packet/tsmp.go).
    pub const TSMP: u8 = 99;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// Bits of TCP's flags byte (RFC 9293, section 3.1).
pub mod tcp_flags {
    /// The sender has no more data.
    pub const FIN: u8 = 0x01;
    /// Opens a connection.
    pub const SYN: u8 = 0x02;
    /// Breaks a connection.
    pub const RST: u8 = 0x04;
    /// What came so far is to be handed on at once.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
    /// The sender has slowed down, for which it was asked.
    pub const CWR: u8 = 0x80;
}

pub(crate) const IPV4_HEADER: usize = 20;
pub(crate) const IPV6_HEADER: usize = 40;
pub(crate) const TCP_HEADER: usize = 20;
pub(crate) const UDP_HEADER: usize = 8;
const ICMP_HEADER: usize = 8;
/// Ports and verification tag; enough to read the ports.
const SCTP_HEADER: usize = 12;

/// Later fragments may not begin within the longest IPv4 and TCP headers, so that they cannot
/// overwrite what the filter has read in the first one (RFC 1858). In units of 8 bytes; the same
/// bound as net/packet/packet.go.
const FIRST_FREE_FRAGMENT_OFFSET: u16 = (60 + TCP_HEADER as u16) / 8;

/// IPv6 extension headers that are stepped over before giving up; real packets have one or two.
const MAX_EXTENSIONS: usize = 8;

/// Why bytes are not a packet that can be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Empty, or of a version that is neither 4 nor 6.
    #[error("not an IP packet")]
    NotIp,
    /// A header or the packet itself says that it is longer than the bytes at hand.
    #[error("packet cut short")]
    Truncated,
    /// A fragment that could overwrite the transport header of another.
    #[error("fragment overlaps the transport header")]
    OverlappingFragment,
    /// More IPv6 extension headers than any honest packet has.
    #[error("too many IPv6 extension headers")]
    TooManyExtensions,
}

/// What follows the IP headers, as far as filtering needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp {
        /// Source port.
        src: u16,
        /// Destination port.
        dst: u16,
        /// See [`tcp_flags`]; 0 in a packet quoted by an ICMP error.
        flags: u8,
    },
    /// UDP.
    Udp {
        /// Source port.
        src: u16,
        /// Destination port.
        dst: u16,
    },
    /// SCTP.
    Sctp {
        /// Source port.
        src: u16,
        /// Destination port.
        dst: u16,
    },
    /// ICMP of the packet's own IP version.
    Icmp(Icmp),
    /// A fragment other than the first: it has no transport header.
    LaterFragment,
    /// Any other protocol.
    Other,
}

/// The kinds of ICMP and ICMPv6 messages that differ to a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Icmp {
    /// A ping.
    EchoRequest {
        /// Tells one pinging process from another.
        id: u16,
    },
    /// A ping's answer.
    EchoReply {
        /// As in the request.
        id: u16,
    },
    /// Unreachable, packet too big, time exceeded or parameter problem: quotes a packet.
    Error,
    /// Anything else.
    Other,
}

/// An IP packet whose headers were checked against its length.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    bytes: &'a [u8],
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    transport: Transport,
    /// Where the transport header begins.
    header: usize,
    /// Where its payload begins.
    payload: usize,
    fragmented: bool,
}

impl<'a> Packet<'a> {
    /// Reads the headers. Bytes behind the packet's own length are padding and are ignored.
    ///
    /// Checksums are not verified: the kernel may leave them to the device.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        Self::read(bytes, false)
    }

    /// The packet that an ICMP error is about: its headers and at least 8 bytes more (RFC 792).
    pub fn quoted(&self) -> Option<Packet<'a>> {
        match self.transport {
            Transport::Icmp(Icmp::Error) if !self.fragmented => {
                Self::read(self.payload(), true).ok()
            }
            _ => None,
        }
    }

    /// The same packet as if it had these addresses, for policy to judge.
    pub fn standing_for(self, src: IpAddr, dst: IpAddr) -> Self {
        Self { src, dst, ..self }
    }

    /// The packet without padding.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Source address.
    pub fn src(&self) -> IpAddr {
        self.src
    }

    /// Destination address.
    pub fn dst(&self) -> IpAddr {
        self.dst
    }

    /// IP protocol number, behind any IPv6 extension headers; see [`protocol`].
    pub fn protocol(&self) -> u8 {
        self.protocol
    }

    /// Ports, flags or ICMP's kind.
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// What follows the transport header: of UDP the datagram, of ICMP what follows its 8 bytes.
    pub fn payload(&self) -> &'a [u8] {
        &self.bytes[self.payload..]
    }

    /// Whether it is the first or a later fragment of a larger packet.
    pub fn is_fragment(&self) -> bool {
        self.fragmented
    }

    /// Whether `bytes` are one more packet of the same flow, which has nothing in it that this one has
    /// not been judged by: UDP, or TCP that neither begins nor ends, whole and without options of IP's.
    /// Returns its length without padding.
    pub fn goes_on_in(&self, bytes: &[u8]) -> Option<usize> {
        let own = self.bytes;
        let plain = |bytes: &[u8]| match bytes.first()? >> 4 {
            4 => (bytes[0] == 0x45 && bytes.len() > IPV4_HEADER)
                .then(|| (usize::from(be16(bytes, 2)), be16(bytes, 6) & 0x3fff == 0)),
            _ => (bytes.len() > IPV6_HEADER)
                .then(|| (IPV6_HEADER + usize::from(be16(bytes, 4)), true)),
        };
        let (len, whole) = plain(bytes)?;
        // Of lengths that the compiler knows.
        let same_addresses = || match self.header {
            IPV4_HEADER => bytes[9] == own[9] && bytes[12..20] == own[12..20],
            _ => bytes[6] == own[6] && bytes[8..40] == own[8..40],
        };
        if ![IPV4_HEADER, IPV6_HEADER].contains(&self.header) {
            return None;
        }
        let at = self.header;
        let quiet = |bytes: &[u8]| {
            bytes[at + 13] & (tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST | tcp_flags::ACK)
                == tcp_flags::ACK
        };
        let least = match self.transport {
            Transport::Udp { .. } => UDP_HEADER,
            Transport::Tcp { .. } => TCP_HEADER,
            _ => return None,
        };
        let same = !self.fragmented
            && whole
            && (at + least..=bytes.len()).contains(&len)
            && bytes[0] >> 4 == own[0] >> 4
            && same_addresses()
            && bytes[at..at + 4] == own[at..at + 4]
            && (least == UDP_HEADER
                || bytes[at + 12] >> 4 == own[at + 12] >> 4
                    && usize::from(own[at + 12] >> 4) * 4 <= len - at
                    && quiet(bytes)
                    && quiet(own));
        same.then_some(len)
    }

    fn read(bytes: &'a [u8], quoted: bool) -> Result<Self, Malformed> {
        match bytes.first().map(|b| b >> 4) {
            Some(4) => Self::read4(bytes, quoted),
            Some(6) => Self::read6(bytes, quoted),
            _ => Err(Malformed::NotIp),
        }
    }

    fn read4(bytes: &'a [u8], quoted: bool) -> Result<Self, Malformed> {
        let fixed: &[u8; IPV4_HEADER] = bytes.first_chunk().ok_or(Malformed::Truncated)?;
        let header = usize::from(fixed[0] & 0x0f) * 4;
        let length = usize::from(be16(fixed, 2));
        if header < IPV4_HEADER || length < header || bytes.len() < header {
            return Err(Malformed::Truncated);
        }
        let bytes = cut(bytes, length, quoted)?;
        let fragment = be16(fixed, 6);
        let packet = Self {
            bytes,
            src: Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15]).into(),
            dst: Ipv4Addr::new(fixed[16], fixed[17], fixed[18], fixed[19]).into(),
            protocol: fixed[9],
            transport: Transport::Other,
            header,
            payload: header,
            fragmented: fragment & 0x3fff != 0,
        };
        packet.with_transport(fragment & 0x1fff, quoted)
    }

    fn read6(bytes: &'a [u8], quoted: bool) -> Result<Self, Malformed> {
        let fixed: &[u8; IPV6_HEADER] = bytes.first_chunk().ok_or(Malformed::Truncated)?;
        let length = IPV6_HEADER + usize::from(be16(fixed, 4));
        let bytes = cut(bytes, length, quoted)?;
        let address = |at: usize| {
            let mut octets = [0; 16];
            octets.copy_from_slice(&fixed[at..at + 16]);
            IpAddr::V6(Ipv6Addr::from(octets))
        };
        let mut packet = Self {
            bytes,
            src: address(8),
            dst: address(24),
            protocol: fixed[6],
            transport: Transport::Other,
            header: IPV6_HEADER,
            payload: IPV6_HEADER,
            fragmented: false,
        };
        for _ in 0..MAX_EXTENSIONS {
            let extension = bytes.get(packet.header..).unwrap_or_default();
            // RFC 8200, section 4, and RFC 4302, section 2.2 for the authentication header.
            let length = match packet.protocol {
                // Hop-by-hop options, routing, destination options.
                0 | 43 | 60 => match extension {
                    [_, blocks, ..] => (usize::from(*blocks) + 1) * 8,
                    _ => return Err(Malformed::Truncated),
                },
                // Authentication.
                51 => match extension {
                    [_, words, ..] => (usize::from(*words) + 2) * 4,
                    _ => return Err(Malformed::Truncated),
                },
                // Fragment.
                44 => 8,
                _ => return packet.with_transport(0, quoted),
            };
            if extension.len() < length {
                return Err(Malformed::Truncated);
            }
            let fragment = (packet.protocol == 44).then(|| be16(extension, 2));
            packet.protocol = extension[0];
            packet.header += length;
            if let Some(fragment) = fragment {
                packet.fragmented |= fragment & 0xfff9 != 0;
                if fragment >> 3 != 0 {
                    return packet.with_transport(fragment >> 3, quoted);
                }
            }
        }
        Err(Malformed::TooManyExtensions)
    }

    /// Reads the transport header; `offset` is the fragment's, in units of 8 bytes.
    fn with_transport(mut self, offset: u16, quoted: bool) -> Result<Self, Malformed> {
        if offset != 0 {
            if offset < FIRST_FREE_FRAGMENT_OFFSET {
                return Err(Malformed::OverlappingFragment);
            }
            self.transport = Transport::LaterFragment;
            self.payload = self.header;
            return Ok(self);
        }
        let rest = self.bytes.get(self.header..).ok_or(Malformed::Truncated)?;
        // An ICMP error may quote no more than the first 8 bytes.
        let need = |length: usize| {
            let length = if quoted { length.min(8) } else { length };
            if rest.len() < length {
                return Err(Malformed::Truncated);
            }
            Ok(length)
        };
        let v4 = self.src.is_ipv4();
        let length = match self.protocol {
            protocol::TCP => {
                need(TCP_HEADER)?;
                let (src, dst) = (be16(rest, 0), be16(rest, 2));
                if quoted {
                    self.transport = Transport::Tcp { src, dst, flags: 0 };
                    8
                } else {
                    let flags = rest[13];
                    self.transport = Transport::Tcp { src, dst, flags };
                    let length = usize::from(rest[12] >> 4) * 4;
                    if length < TCP_HEADER || rest.len() < length && !self.fragmented {
                        return Err(Malformed::Truncated);
                    }
                    length.min(rest.len())
                }
            }
            protocol::UDP => {
                let length = need(UDP_HEADER)?;
                let (src, dst) = (be16(rest, 0), be16(rest, 2));
                self.transport = Transport::Udp { src, dst };
                length
            }
            protocol::SCTP => {
                let length = need(SCTP_HEADER)?;
                let (src, dst) = (be16(rest, 0), be16(rest, 2));
                self.transport = Transport::Sctp { src, dst };
                length
            }
            protocol::ICMP if v4 => {
                let length = need(ICMP_HEADER)?;
                let id = be16(rest, 4);
                // RFC 792.
                self.transport = Transport::Icmp(match rest[0] {
                    8 => Icmp::EchoRequest { id },
                    0 => Icmp::EchoReply { id },
                    3 | 11 | 12 => Icmp::Error,
                    _ => Icmp::Other,
                });
                length
            }
            protocol::ICMPV6 if !v4 => {
                let length = need(ICMP_HEADER)?;
                let id = be16(rest, 4);
                // RFC 4443.
                self.transport = Transport::Icmp(match rest[0] {
                    128 => Icmp::EchoRequest { id },
                    129 => Icmp::EchoReply { id },
                    1..=4 => Icmp::Error,
                    _ => Icmp::Other,
                });
                length
            }
            _ => 0,
        };
        self.payload = self.header + length;
        Ok(self)
    }
}

/// The packet without what lies behind its own length. A quoted one may be shorter than it says.
fn cut(bytes: &[u8], length: usize, quoted: bool) -> Result<&[u8], Malformed> {
    match bytes.get(..length) {
        Some(packet) => Ok(packet),
        None if quoted => Ok(bytes),
        None => Err(Malformed::Truncated),
    }
}

pub fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// A UDP packet with its checksums.
///
/// `None` if the addresses are of two families or the payload is too long for one packet.
pub fn udp(src: SocketAddr, dst: SocketAddr, payload: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(UDP_HEADER + payload.len()).ok()?;
    let mut packet = ip_header(src.ip(), dst.ip(), protocol::UDP, length)?;
    let start = packet.len();
    packet.extend(src.port().to_be_bytes());
    packet.extend(dst.port().to_be_bytes());
    packet.extend(length.to_be_bytes());
    packet.extend([0; 2]);
    packet.extend(payload);
    let sum = transport_checksum(src.ip(), dst.ip(), protocol::UDP, &packet[start..]);
    // Zero would mean "no checksum" (RFC 768).
    let sum = if sum == 0 { 0xffff } else { sum };
    packet[start + 6..start + 8].copy_from_slice(&sum.to_be_bytes());
    Some(packet)
}

/// The answer to a ping; `None` if the packet is not a whole one.
pub fn echo_reply(request: &Packet<'_>) -> Option<Vec<u8>> {
    let Transport::Icmp(Icmp::EchoRequest { .. }) = request.transport else {
        return None;
    };
    if request.fragmented {
        return None;
    }
    let message = &request.bytes[request.header..];
    let (src, dst) = (request.dst, request.src);
    let length = u16::try_from(message.len()).ok()?;
    let mut packet = ip_header(src, dst, request.protocol, length)?;
    let start = packet.len();
    packet.extend(message);
    packet[start] = if src.is_ipv4() { 0 } else { 129 };
    packet[start + 2..start + 4].fill(0);
    let sum = if src.is_ipv4() {
        !fold(sum(0, &packet[start..]))
    } else {
        transport_checksum(src, dst, request.protocol, &packet[start..])
    };
    packet[start + 2..start + 4].copy_from_slice(&sum.to_be_bytes());
    Some(packet)
}

/// The answer to a TSMP ping (net/packet/tsmp.go); `None` if the packet is not a whole one.
pub fn tsmp_pong(request: &Packet<'_>) -> Option<Vec<u8>> {
    if request.protocol != protocol::TSMP || request.fragmented {
        return None;
    }
    let (b'p', rest) = request.payload().split_first()? else {
        return None;
    };
    let data: &[u8; 8] = rest.first_chunk()?;
    let mut packet = ip_header(request.dst, request.src, protocol::TSMP, 11)?;
    packet.push(b'o');
    packet.extend(data);
    // The port of the peer API: there is none.
    packet.extend([0; 2]);
    Some(packet)
}

/// An IP header for `length` bytes of payload, with room for them behind it.
fn ip_header(src: IpAddr, dst: IpAddr, protocol: u8, length: u16) -> Option<Vec<u8>> {
    /// Linux's default.
    const HOP_LIMIT: u8 = 64;
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let total = length.checked_add(IPV4_HEADER as u16)?;
            let mut header = Vec::with_capacity(usize::from(total));
            header.extend([0x45, 0]);
            header.extend(total.to_be_bytes());
            // No identification is needed: "don't fragment" makes it atomic (RFC 6864).
            header.extend([0, 0, 0x40, 0, HOP_LIMIT, protocol, 0, 0]);
            header.extend(src.octets());
            header.extend(dst.octets());
            let sum = !fold(sum(0, &header));
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            Some(header)
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let mut header = Vec::with_capacity(IPV6_HEADER + usize::from(length));
            header.extend([0x60, 0, 0, 0]);
            header.extend(length.to_be_bytes());
            header.extend([protocol, HOP_LIMIT]);
            header.extend(src.octets());
            header.extend(dst.octets());
            Some(header)
        }
        _ => None,
    }
}

/// The checksum over a pseudo header and the transport (RFC 768; RFC 8200, section 8.1).
fn transport_checksum(src: IpAddr, dst: IpAddr, protocol: u8, transport: &[u8]) -> u16 {
    // No transport that is written here is longer than a packet.
    let mut total = sum(0, &[0, protocol]);
    total = sum(total, &(transport.len() as u16).to_be_bytes());
    for address in [src, dst] {
        total = match address {
            IpAddr::V4(a) => sum(total, &a.octets()),
            IpAddr::V6(a) => sum(total, &a.octets()),
        };
    }
    !fold(sum(total, transport))
}

/// Adds up 16-bit words in whichever byte order (RFC 1071, section 2), for [`fold`]; an odd byte at
/// the end counts as followed by zero.
pub fn sum(start: u64, bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn with_avx2(start: u64, bytes: &[u8]) -> u64 {
            sum_words(start, bytes)
        }
        if bytes.len() >= 128 && is_x86_feature_detected!("avx2") {
            // SAFETY: this CPU has it.
            return unsafe { with_avx2(start, bytes) };
        }
    }
    sum_words(start, bytes)
}

/// Sums of 32-bit words fold to the same, and the compiler makes vectors of the machine's own.
#[inline(always)]
fn sum_words(start: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    let total = words
        .iter()
        .fold(start, |sum, w| sum + u64::from(u32::from_ne_bytes(*w)));
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total + u64::from(u32::from_ne_bytes(last))
}

/// Adds the carries in. What is to be read and written is the result's big-endian bytes.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    u16::from_be(sum as u16)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::SocketAddr;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// A TCP packet without options.
    pub(crate) fn tcp(src: SocketAddr, dst: SocketAddr, flags: u8) -> Vec<u8> {
        let mut packet = ip_header(src.ip(), dst.ip(), protocol::TCP, 20).unwrap();
        packet.extend(src.port().to_be_bytes());
        packet.extend(dst.port().to_be_bytes());
        packet.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        packet
    }

    /// An ICMP message of the family of its addresses.
    pub(crate) fn icmp(src: IpAddr, dst: IpAddr, kind: u8, id: u16, data: &[u8]) -> Vec<u8> {
        let proto = if src.is_ipv4() {
            protocol::ICMP
        } else {
            protocol::ICMPV6
        };
        raw(
            src,
            dst,
            proto,
            &[&[kind, 0, 0, 0], &id.to_be_bytes()[..], &[0, 1], data].concat(),
        )
    }

    /// Any protocol.
    pub(crate) fn raw(src: IpAddr, dst: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = ip_header(src, dst, protocol, payload.len() as u16).unwrap();
        packet.extend(payload);
        packet
    }

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn endpoints() -> impl Strategy<Value = (SocketAddr, SocketAddr)> {
        prop_oneof![
            any::<([u8; 4], u16, [u8; 4], u16)>()
                .prop_map(|(a, p, b, q)| { (SocketAddr::from((a, p)), SocketAddr::from((b, q))) }),
            any::<([u8; 16], u16, [u8; 16], u16)>()
                .prop_map(|(a, p, b, q)| { (SocketAddr::from((a, p)), SocketAddr::from((b, q))) }),
        ]
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in vec(any::<u8>(), 0..200), version in any::<bool>()) {
            for first in [None, Some(if version { 0x45 } else { 0x60 })] {
                if let (Some(first), Some(byte)) = (first, bytes.first_mut()) {
                    *byte = first;
                }
                if let Ok(packet) = Packet::parse(&bytes) {
                    let _ = (packet.payload(), packet.quoted(), echo_reply(&packet), tsmp_pong(&packet));
                }
            }
        }

        #[test]
        fn any_chain_of_extensions_is_read(
            chain in vec((prop::sample::select(&[0u8, 43, 44, 51, 60, 6, 17, 58, 59]), any::<[u8; 7]>()), 0..12),
        ) {
            let payload: Vec<u8> = chain.iter().flat_map(|(next, rest)| {
                let mut header = vec![*next];
                header.extend(rest);
                header[1] &= 1;
                header
            }).collect();
            let ip = IpAddr::V6(Ipv6Addr::LOCALHOST);
            for first in [0, 43, 44, 51, 60] {
                if let Ok(packet) = Packet::parse(&raw(ip, ip, first, &payload)) {
                    prop_assert!(packet.payload().len() <= payload.len());
                }
            }
        }

        #[test]
        fn what_goes_on_would_be_judged_alike(
            (src, dst) in endpoints(),
            is_tcp in any::<bool>(),
            flags in prop::sample::select(&[0x10u8, 0x18, 0x02, 0x11, 0x04]),
            changes in vec((0usize..64, any::<u8>()), 0..3),
            padding in 0usize..3,
        ) {
            let first = match is_tcp {
                true => tcp(src, dst, flags),
                false => udp(src, dst, b"something").unwrap(),
            };
            let packet = Packet::parse(&first).unwrap();
            let mut next = first.clone();
            next.extend(vec![0; padding]);
            for (at, byte) in changes {
                let len = next.len();
                next[at % len] = byte;
            }
            if let Some(len) = packet.goes_on_in(&next) {
                let next = Packet::parse(&next).unwrap();
                prop_assert_eq!(next.bytes().len(), len);
                prop_assert_eq!((next.src(), next.dst(), next.protocol()), (packet.src(), packet.dst(), packet.protocol()));
                prop_assert!(!next.is_fragment());
                match (packet.transport(), next.transport()) {
                    (Transport::Tcp { src, dst, flags }, Transport::Tcp { src: a, dst: b, flags: other }) => {
                        prop_assert_eq!((src, dst), (a, b));
                        for flags in [flags, other] {
                            prop_assert_eq!(flags & 0x17, tcp_flags::ACK);
                        }
                    }
                    (ours, other) => prop_assert_eq!(ours, other),
                }
            } else {
                prop_assert!(next != first || is_tcp && flags & 0x17 != tcp_flags::ACK);
            }
        }

        #[test]
        fn udp_is_read_back((src, dst) in endpoints(), payload in vec(any::<u8>(), 0..600), padding in 0usize..16) {
            let mut bytes = udp(src, dst, &payload).unwrap();
            bytes.extend(vec![0xaa; padding]);
            let packet = Packet::parse(&bytes).unwrap();
            prop_assert_eq!(packet.src(), src.ip());
            prop_assert_eq!(packet.dst(), dst.ip());
            prop_assert_eq!(packet.transport(), Transport::Udp { src: src.port(), dst: dst.port() });
            prop_assert_eq!(packet.payload(), &payload[..]);
            prop_assert_eq!(packet.protocol(), protocol::UDP);
            prop_assert!(!packet.is_fragment());
            // Whoever verifies a checksum sums over it and gets zero.
            prop_assert_eq!(
                transport_checksum(src.ip(), dst.ip(), protocol::UDP, &packet.bytes()[packet.header..]), 0
            );
            if src.is_ipv4() {
                prop_assert_eq!(fold(sum(0, &bytes[..IPV4_HEADER])), 0xffff);
            }
        }

        #[test]
        fn tcp_is_read_back((src, dst) in endpoints(), flags in any::<u8>(), cut in 0usize..20) {
            let bytes = tcp(src, dst, flags);
            let packet = Packet::parse(&bytes).unwrap();
            prop_assert_eq!(packet.transport(), Transport::Tcp { src: src.port(), dst: dst.port(), flags });
            prop_assert!(packet.payload().is_empty());
            prop_assert_eq!(Packet::parse(&bytes[..bytes.len() - 1 - cut]).unwrap_err(), Malformed::Truncated);
        }

        #[test]
        fn pings_are_answered((src, dst) in endpoints(), id in any::<u16>(), data in vec(any::<u8>(), 0..100)) {
            let kind = if src.is_ipv4() { 8 } else { 128 };
            let bytes = icmp(src.ip(), dst.ip(), kind, id, &data);
            let request = Packet::parse(&bytes).unwrap();
            prop_assert_eq!(request.transport(), Transport::Icmp(Icmp::EchoRequest { id }));
            let bytes = echo_reply(&request).unwrap();
            let reply = Packet::parse(&bytes).unwrap();
            prop_assert_eq!(reply.transport(), Transport::Icmp(Icmp::EchoReply { id }));
            prop_assert_eq!((reply.src(), reply.dst()), (dst.ip(), src.ip()));
            prop_assert_eq!(reply.payload(), &data[..]);
            prop_assert!(echo_reply(&reply).is_none());
        }

        #[test]
        fn tsmp_pings_are_answered((src, dst) in endpoints(), data in any::<[u8; 8]>(), kind in any::<u8>(), cut in 1usize..9) {
            let message = [&[kind], &data[..]].concat();
            let bytes = raw(src.ip(), dst.ip(), protocol::TSMP, &message);
            let pong = tsmp_pong(&Packet::parse(&bytes).unwrap());
            prop_assert_eq!(pong.is_some(), kind == b'p');
            let ping = [b"p", &data[..]].concat();
            let bytes = raw(src.ip(), dst.ip(), protocol::TSMP, &ping);
            let pong = tsmp_pong(&Packet::parse(&bytes).unwrap()).unwrap();
            let pong = Packet::parse(&pong).unwrap();
            prop_assert_eq!((pong.src(), pong.dst(), pong.protocol()), (dst.ip(), src.ip(), protocol::TSMP));
            prop_assert_eq!(pong.payload(), [b"o", &data[..], &[0, 0]].concat());
            let short = raw(src.ip(), dst.ip(), protocol::TSMP, &ping[..9 - cut]);
            prop_assert!(tsmp_pong(&Packet::parse(&short).unwrap()).is_none());
        }

        #[test]
        fn errors_quote_packets((src, dst) in endpoints(), keep in 28usize..60) {
            let keep = if src.is_ipv4() { keep } else { keep + 20 };
            let sent = udp(src, dst, &[7; 100]).unwrap();
            let kind = if src.is_ipv4() { 3 } else { 1 };
            let bytes = icmp(dst.ip(), src.ip(), kind, 0, &sent[..keep.min(sent.len())]);
            let quoted = Packet::parse(&bytes).unwrap();
            let quoted = quoted.quoted().unwrap();
            prop_assert_eq!(quoted.transport(), Transport::Udp { src: src.port(), dst: dst.port() });
            prop_assert_eq!(quoted.src(), src.ip());
        }
    }

    #[test]
    fn fragments() {
        let whole = udp(addr("100.64.0.1:1"), addr("100.64.0.2:2"), &[0; 16]).unwrap();
        let at = |offset: u16, more: bool| {
            let mut bytes = whole.clone();
            bytes[6..8].copy_from_slice(&(offset | u16::from(more) << 13).to_be_bytes());
            bytes
        };
        let (first, middle, last) = (at(0, true), at(100, true), at(200, false));
        let first = Packet::parse(&first).unwrap();
        assert_eq!(first.transport(), Transport::Udp { src: 1, dst: 2 });
        assert!(first.is_fragment());
        for later in [&middle, &last] {
            let packet = Packet::parse(later).unwrap();
            assert_eq!(packet.transport(), Transport::LaterFragment);
            assert!(packet.is_fragment());
        }
        for offset in 1..10 {
            assert_eq!(
                Packet::parse(&at(offset, true)).unwrap_err(),
                Malformed::OverlappingFragment
            );
        }
        assert!(Packet::parse(&at(10, true)).is_ok());
    }

    #[test]
    fn ipv6_extensions() {
        let (src, dst) = (addr("[fd7a::1]:1"), addr("[fd7a::2]:2"));
        let plain = udp(src, dst, b"hello").unwrap();
        let datagram = &plain[IPV6_HEADER..];
        // Hop-by-hop, then the fragment header of a packet in one piece.
        let chain = [
            &[44, 0, 5, 2, 0, 0, 0, 0],
            &[17u8, 0, 0, 0, 0, 0, 0, 9][..],
            datagram,
        ]
        .concat();
        let bytes = raw(src.ip(), dst.ip(), 0, &chain);
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!(packet.transport(), Transport::Udp { src: 1, dst: 2 });
        assert_eq!(packet.payload(), b"hello");
        assert!(!packet.is_fragment());
        let later = [&[17u8, 0, 0x03, 0x20, 0, 0, 0, 9][..], &[0; 32]].concat();
        let bytes = raw(src.ip(), dst.ip(), 44, &later);
        assert_eq!(
            Packet::parse(&bytes).unwrap().transport(),
            Transport::LaterFragment
        );
        let endless = [60u8, 0, 0, 0, 0, 0, 0, 0].repeat(20);
        let bytes = raw(src.ip(), dst.ip(), 60, &endless);
        assert_eq!(
            Packet::parse(&bytes).unwrap_err(),
            Malformed::TooManyExtensions
        );
    }
}
