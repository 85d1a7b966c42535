//! STUN: asking a server from which address our packets come (RFC 8489; net/stun/stun.go).
//!
//! Only binding requests and their answers. Tailscale's servers answer requests that carry its
//! SOFTWARE attribute and end in a FINGERPRINT, and so do ours.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Ties an answer to its request.
pub type TxId = [u8; 12];

const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
const HEADER: usize = 20;
const BINDING_REQUEST: [u8; 2] = [0x00, 0x01];
const BINDING_SUCCESS: [u8; 2] = [0x01, 0x01];
const MAPPED_ADDRESS: u16 = 0x0001;
const XOR_MAPPED_ADDRESS: u16 = 0x0020;
/// What some old servers send for XOR-MAPPED-ADDRESS.
const XOR_MAPPED_ADDRESS_ALT: u16 = 0x8020;
const SOFTWARE: u16 = 0x8022;
const FINGERPRINT: u16 = 0x8028;
/// The name that Tailscale's servers want to see (net/stun/stun.go).
const SOFTWARE_NAME: &[u8; 8] = b"tailnode";
/// Attribute header and CRC.
const FINGERPRINT_LEN: usize = 4 + 4;

/// Why a packet was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not STUN at all.
    #[error("not a STUN packet")]
    NotStun,
    /// Another kind of STUN message.
    #[error("not the STUN message that was expected")]
    Kind,
    /// Attributes run over the end, or the address is missing.
    #[error("STUN packet has malformed attributes")]
    Attributes,
    /// A request from other software than Tailscale's.
    #[error("STUN request does not come from a Tailscale node")]
    Software,
    /// A request whose FINGERPRINT is missing or wrong.
    #[error("STUN request has no valid fingerprint")]
    Fingerprint,
}

/// Whether `packet` is STUN rather than WireGuard or disco.
pub fn is_stun(packet: &[u8]) -> bool {
    packet.len() >= HEADER && packet[0] & 0xc0 == 0 && packet[4..8] == COOKIE
}

/// A binding request.
pub fn request(tx_id: &TxId) -> Vec<u8> {
    let attributes = 4 + SOFTWARE_NAME.len() + FINGERPRINT_LEN;
    let mut out = header(BINDING_REQUEST, attributes, tx_id);
    put_attribute(&mut out, SOFTWARE, SOFTWARE_NAME);
    let crc = fingerprint(&out);
    put_attribute(&mut out, FINGERPRINT, &crc.to_be_bytes());
    out
}

/// The transaction of a binding request.
pub fn parse_request(packet: &[u8]) -> Result<TxId, Error> {
    let (tx_id, body) = parse_header(packet, BINDING_REQUEST)?;
    let (mut software, mut last) = (false, None);
    for attribute in Attributes(body) {
        let (kind, value) = attribute?;
        software |= kind == SOFTWARE && value == SOFTWARE_NAME;
        last = Some((kind, value));
    }
    if !software {
        return Err(Error::Software);
    }
    let signed = &packet[..packet.len() - FINGERPRINT_LEN];
    match last {
        Some((FINGERPRINT, crc)) if crc == fingerprint(signed).to_be_bytes() => Ok(tx_id),
        _ => Err(Error::Fingerprint),
    }
}

/// The answer to the request of `tx_id` that came from `addr`.
pub fn response(tx_id: &TxId, addr: SocketAddr) -> Vec<u8> {
    let (family, mut ip) = match addr.ip().to_canonical() {
        IpAddr::V4(v4) => (1, v4.octets().to_vec()),
        IpAddr::V6(v6) => (2, v6.octets().to_vec()),
    };
    xor(&mut ip, tx_id);
    let mut port = addr.port().to_be_bytes();
    xor(&mut port, tx_id);
    let value = [&[0, family], &port[..], &ip].concat();
    let mut out = header(BINDING_SUCCESS, 4 + value.len(), tx_id);
    put_attribute(&mut out, XOR_MAPPED_ADDRESS, &value);
    out
}

/// The transaction of an answer, and our address as the server saw it.
pub fn parse_response(packet: &[u8]) -> Result<(TxId, SocketAddr), Error> {
    let (tx_id, body) = parse_header(packet, BINDING_SUCCESS)?;
    // Bytes after the message are ignored, as stun.go does.
    let len = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    let body = body.get(..len).ok_or(Error::Attributes)?;
    let (mut xored, mut plain) = (None, None);
    for attribute in Attributes(body) {
        match attribute? {
            (XOR_MAPPED_ADDRESS | XOR_MAPPED_ADDRESS_ALT, value) => {
                xored = Some(get_address(value, Some(&tx_id))?);
            }
            (MAPPED_ADDRESS, value) => plain = Some(get_address(value, None)?),
            _ => {}
        }
    }
    xored
        .or(plain)
        .map(|addr| (tx_id, addr))
        .ok_or(Error::Attributes)
}

fn header(kind: [u8; 2], attributes: usize, tx_id: &TxId) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + attributes);
    out.extend_from_slice(&kind);
    // At most 24 bytes of attributes are ever written here.
    out.extend_from_slice(&(attributes as u16).to_be_bytes());
    out.extend_from_slice(&COOKIE);
    out.extend_from_slice(tx_id);
    out
}

/// Every value written here has a multiple of 4 bytes, so none needs padding.
fn put_attribute(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(value.len() as u16).to_be_bytes());
    out.extend_from_slice(value);
}

fn parse_header(packet: &[u8], kind: [u8; 2]) -> Result<(TxId, &[u8]), Error> {
    if !is_stun(packet) {
        return Err(Error::NotStun);
    }
    if packet[..2] != kind {
        return Err(Error::Kind);
    }
    let (tx_id, body) = packet[8..].split_first_chunk().ok_or(Error::NotStun)?;
    Ok((*tx_id, body))
}

/// Kind and value of each attribute.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let rest = std::mem::take(&mut self.0);
        let Some((&[k0, k1, l0, l1], rest)) = rest.split_first_chunk() else {
            return Some(Err(Error::Attributes));
        };
        let len = usize::from(u16::from_be_bytes([l0, l1]));
        let Some((padded, rest)) = rest.split_at_checked(len.next_multiple_of(4)) else {
            return Some(Err(Error::Attributes));
        };
        self.0 = rest;
        Some(Ok((u16::from_be_bytes([k0, k1]), &padded[..len])))
    }
}

fn get_address(value: &[u8], mask: Option<&TxId>) -> Result<SocketAddr, Error> {
    let (&[_, family, p0, p1], ip) = value.split_first_chunk().ok_or(Error::Attributes)?;
    let mut port = [p0, p1];
    let mut ip = ip.to_vec();
    if let Some(tx_id) = mask {
        xor(&mut port, tx_id);
        xor(&mut ip, tx_id);
    }
    let ip = match family {
        1 => ip.first_chunk::<4>().map(|ip| Ipv4Addr::from(*ip).into()),
        2 => ip
            .first_chunk::<16>()
            .map(|ip| Ipv6Addr::from(*ip).to_canonical()),
        _ => None,
    };
    Ok(SocketAddr::new(
        ip.ok_or(Error::Attributes)?,
        u16::from_be_bytes(port),
    ))
}

/// The mask is the cookie, then the transaction; the port takes its first half.
fn xor(bytes: &mut [u8], tx_id: &TxId) {
    for (byte, mask) in bytes.iter_mut().zip(COOKIE.iter().chain(tx_id)) {
        *byte ^= mask;
    }
}

/// CRC-32 (ISO 3309) xored with "STUN", RFC 8489 section 14.7. Bit by bit: it runs over 32 bytes.
fn fingerprint(packet: &[u8]) -> u32 {
    let crc = packet.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    });
    !crc ^ 0x5354_554e
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 5769 section 2.1.
    const SAMPLE_REQUEST: &[u8] =
        b"\x00\x01\x00\x58\x21\x12\xa4\x42\xb7\xe7\xa7\x01\xbc\x34\xd6\x86\
        \xfa\x87\xdf\xae\x80\x22\x00\x10STUN test client\x00\x24\x00\x04\x6e\x00\x01\xff\x80\x29\
        \x00\x08\x93\x2f\xf9\xb1\x51\x26\x3b\x36\x00\x06\x00\x09evtj:h6vY\x20\x20\x20\x00\x08\x00\
        \x14\x9a\xea\xa7\x0c\xbf\xd8\xcb\x56\x78\x1e\xf2\xb5\xb2\xd3\xf2\x49\xc1\xb5\x71\xa2\x80\
        \x28\x00\x04\xe5\x7a\x3b\xcf";
    /// RFC 5769 section 2.2.
    const SAMPLE_IPV4: &[u8] = b"\x01\x01\x00\x3c\x21\x12\xa4\x42\xb7\xe7\xa7\x01\xbc\x34\xd6\x86\
        \xfa\x87\xdf\xae\x80\x22\x00\x0btest vector\x20\x00\x20\x00\x08\x00\x01\xa1\x47\xe1\x12\
        \xa6\x43\x00\x08\x00\x14\x2b\x91\xf5\x99\xfd\x9e\x90\xc3\x8c\x74\x89\xf9\x2a\xf9\xba\x53\
        \xf0\x6b\xe7\xd7\x80\x28\x00\x04\xc0\x7d\x4c\x96";
    /// RFC 5769 section 2.3.
    const SAMPLE_IPV6: &[u8] = b"\x01\x01\x00\x48\x21\x12\xa4\x42\xb7\xe7\xa7\x01\xbc\x34\xd6\x86\
        \xfa\x87\xdf\xae\x80\x22\x00\x0btest vector\x20\x00\x20\x00\x14\x00\x02\xa1\x47\x01\x13\
        \xa9\xfa\xa5\xd3\xf1\x79\xbc\x25\xf4\xb5\xbe\xd2\xb9\xd9\x00\x08\x00\x14\xa3\x82\x95\x4e\
        \x4b\xe6\x7b\xf1\x17\x84\xc9\x7c\x82\x92\xc2\x75\xbf\xe3\xed\x41\x80\x28\x00\x04\xc8\xfb\
        \x0b\x4c";
    const SAMPLE_TX: TxId = *b"\xb7\xe7\xa7\x01\xbc\x34\xd6\x86\xfa\x87\xdf\xae";

    #[test]
    fn rfc_5769_responses() {
        for (packet, addr) in [
            (SAMPLE_IPV4, "192.0.2.1:32853"),
            (SAMPLE_IPV6, "[2001:db8:1234:5678:11:2233:4455:6677]:32853"),
        ] {
            assert_eq!(
                parse_response(packet),
                Ok((SAMPLE_TX, addr.parse().unwrap()))
            );
        }
    }

    #[test]
    fn rfc_5769_fingerprints() {
        for packet in [SAMPLE_REQUEST, SAMPLE_IPV4, SAMPLE_IPV6] {
            let (signed, attribute) = packet.split_at(packet.len() - FINGERPRINT_LEN);
            assert_eq!(attribute[4..], fingerprint(signed).to_be_bytes());
        }
    }

    #[test]
    fn other_software_is_refused() {
        assert_eq!(parse_request(SAMPLE_REQUEST), Err(Error::Software));
    }

    #[test]
    fn a_request_is_that_of_stun_go() {
        let request = request(&SAMPLE_TX);
        assert_eq!(
            request[..HEADER],
            *b"\x00\x01\x00\x14\x21\x12\xa4\x42\xb7\xe7\xa7\x01\xbc\x34\xd6\x86\xfa\x87\xdf\xae"
        );
        assert_eq!(request[HEADER..][..12], *b"\x80\x22\x00\x08tailnode");
        assert_eq!(request[HEADER + 12..][..4], *b"\x80\x28\x00\x04");
        assert_eq!(request.len(), 40);
    }

    #[test]
    fn wireguard_and_disco_are_not_stun() {
        assert!(!is_stun(&[1; 148]));
        assert!(!is_stun("TS💬 and a key and a nonce and a box".as_bytes()));
        assert!(is_stun(SAMPLE_REQUEST));
    }

    #[test]
    fn a_plain_address_is_good_enough() {
        let mut packet = header(BINDING_SUCCESS, 12, &SAMPLE_TX);
        put_attribute(&mut packet, MAPPED_ADDRESS, &[0, 1, 0, 80, 10, 0, 0, 1]);
        assert_eq!(
            parse_response(&packet),
            Ok((SAMPLE_TX, "10.0.0.1:80".parse().unwrap()))
        );
    }

    proptest! {
        #[test]
        fn requests_and_responses_return(tx_id: TxId, ip: IpAddr, port: u16) {
            let addr = SocketAddr::new(ip.to_canonical(), port);
            prop_assert_eq!(parse_request(&request(&tx_id)), Ok(tx_id));
            prop_assert_eq!(parse_response(&response(&tx_id, addr)), Ok((tx_id, addr)));
        }

        #[test]
        fn a_changed_request_is_refused(tx_id: TxId, at in 0usize..40, flip in 1u8..) {
            let mut packet = request(&tx_id);
            packet[at] ^= flip;
            prop_assert_ne!(parse_request(&packet), Ok(tx_id));
        }

        #[test]
        fn no_bytes_panic(body: Vec<u8>, tx_id: TxId) {
            for kind in [BINDING_REQUEST, BINDING_SUCCESS] {
                let mut packet = header(kind, body.len(), &tx_id);
                packet.extend_from_slice(&body);
                for packet in [&packet[..], &body] {
                    let _ = parse_request(packet);
                    let _ = parse_response(packet);
                }
            }
        }
    }
}
