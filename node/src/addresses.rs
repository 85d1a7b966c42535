//! The host's own addresses, and word of their changes.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    },
};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::warn;

/// Places on the Internet that nobody is at (RFC 5737, RFC 3849): routes lead there all the same.
const ELSEWHERE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];
/// Multicast groups of rtnetlink (linux/rtnetlink.h): addresses and routes, IPv4 and IPv6.
const GROUPS: i32 = libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_ROUTE;

/// The addresses of a host at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Those that peers may reach; loopback only where there is nothing else.
    pub all: Vec<IpAddr>,
    /// From which packets for the Internet leave, by IPv4 and by IPv6.
    outward: [Option<IpAddr>; 2],
}

impl Addresses {
    /// Those of the calling thread's network namespace.
    pub fn look() -> Self {
        Self {
            all: reachable(),
            outward: ELSEWHERE.map(source),
        }
    }

    /// Whether what was measured with `before` may no longer hold: an address is gone, or packets
    /// take another way. With more addresses, such as a bridge's for containers, it does.
    pub fn is_a_move_from(&self, before: &Self) -> bool {
        self.goes_another_way_than(before) || before.all.iter().any(|ip| !self.all.contains(ip))
    }

    /// Whether packets for the Internet leave from another address than before.
    pub fn goes_another_way_than(&self, before: &Self) -> bool {
        let mut outward = before.outward.iter().zip(&self.outward);
        outward.any(|(before, now)| before.is_some() && before != now)
    }
}

fn reachable() -> Vec<IpAddr> {
    let interfaces = match getifaddrs() {
        Ok(interfaces) => interfaces,
        Err(error) => {
            warn!(%error, "cannot list the host's addresses");
            return Vec::new();
        }
    };
    let all: Vec<IpAddr> = interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
                (Some(v4), _) => Some(IpAddr::V4(v4.ip())),
                (_, Some(v6)) => Some(IpAddr::V6(v6.ip())),
                _ => None,
            }
        })
        .filter(|ip| match ip {
            IpAddr::V4(v4) => !v4.is_link_local() && !v4.is_unspecified(),
            IpAddr::V6(v6) => !v6.is_unicast_link_local() && !v6.is_unspecified(),
        })
        // An address of another node on this host is a way through a tailnet, not to this node.
        .filter(|ip| !is_tailnet(*ip))
        .collect();
    let (loopback, others): (Vec<_>, Vec<_>) = all.into_iter().partition(IpAddr::is_loopback);
    if others.is_empty() { loopback } else { others }
}

/// Whether the address is from the ranges of tailnets (net/tsaddr/tsaddr.go).
fn is_tailnet(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.octets()[0] == 100 && v4.octets()[1] & 0xc0 == 64,
        IpAddr::V6(v6) => v6.segments()[..3] == [0xfd7a, 0x115c, 0xa1e0],
    }
}

/// From which address packets to this one would leave; to connect sends none.
fn source(to: IpAddr) -> Option<IpAddr> {
    let any: IpAddr = match to {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(SocketAddr::new(to, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Tells of changes in the namespace of the thread that opened it.
pub struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    /// Needs a tokio runtime.
    pub fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkRoute,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS as u32))?;
        // SAFETY: an OwnedFd stays open, and the same, for as long as the AsyncFd owns it.
        let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        Ok(Self(registered.map_err(io::Error::from)?))
    }

    /// Resolves after something has changed: look again, for it does not say what.
    pub async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut heard = false;
            loop {
                match recv(self.0.as_raw_fd(), &mut [0; 4096], MsgFlags::empty()) {
                    // Some changes found no room: they are changes all the same.
                    Ok(_) | Err(Errno::ENOBUFS) => heard = true,
                    Err(Errno::EAGAIN) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            ready.clear_ready();
            if heard {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_is_a_lost_address_or_another_way() {
        let [a, b]: [IpAddr; 2] = ["192.0.2.5", "198.51.100.5"].map(|ip| ip.parse().unwrap());
        let with = |all: &[IpAddr], outward| Addresses {
            all: all.to_vec(),
            outward: [outward, None],
        };
        let before = with(&[a], Some(a));
        for (after, moved) in [
            (with(&[a], Some(a)), false),
            (with(&[a, b], Some(a)), false),
            (with(&[a, b], Some(b)), true),
            (with(&[a], None), true),
            (with(&[b], Some(b)), true),
        ] {
            assert_eq!(after.is_a_move_from(&before), moved, "{after:?}");
        }
        assert!(!before.is_a_move_from(&with(&[a], None)));
        let bridge_gone = before.clone();
        assert!(!bridge_gone.goes_another_way_than(&with(&[a, b], Some(a))));
        assert!(!before.is_a_move_from(&Addresses::default()));
    }

    #[tokio::test]
    async fn the_host_can_be_looked_at_and_watched() {
        assert!(!Addresses::look().all.is_empty());
        Watch::open().unwrap();
    }
}
