//! The node's one UDP socket, which WireGuard, disco and STUN share.

use std::{
    io::{self, IoSliceMut},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
};

use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
    set_socket_recv_buffer_size, set_socket_recv_buffer_size_force, set_socket_send_buffer_size,
    set_socket_send_buffer_size_force,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::{debug, info};

/// The most a UDP datagram, or a train of them, can hold.
const DATAGRAM_MAX: usize = 65_535;
/// A train the kernel takes without splitting hairs: IPv6 and UDP headers stay below 64 KiB.
const TRAIN_MAX: usize = 65_535 - 40 - 8;

/// What the kernel may hold for us in each direction, in bytes (it doubles the number for what a
/// packet costs beside its bytes). A burst of the container's is a train of 64 KiB; the kernel's own
/// default has room for three. What is larger than needed fills before it drops, and delays all
/// behind it. Where the apps leave few turns to who receives, 512 KiB lost 1 to 4 % of a stream's trains,
/// this 0.5 %, and twice as much none; the median ping beside the stream took 1.0, 1.3 and 1.5 ms.
const SOCKET_BUFFER: usize = 1 << 20;
/// Buffers that one system call may fill, each with a whole train. Few stay in the processor's cache.
const BUFFERS: usize = 8;

/// A socket in the network namespace of the thread that opened it.
pub struct Udp {
    /// Its loop is woken by what arrives alone: with every datagram that has left there is room again, and
    /// nobody waits for room.
    socket: AsyncFd<Socket>,
    state: UdpSocketState,
    dual: bool,
    /// Trains of datagrams failed once: send one by one.
    single: AtomicBool,
}

/// Where received datagrams are put; shared by all nodes that a thread runs.
pub struct Batch {
    buffers: Vec<Vec<u8>>,
    metas: [RecvMeta; BUFFERS],
    filled: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            buffers: vec![vec![0; DATAGRAM_MAX]; BUFFERS],
            metas: [RecvMeta::default(); BUFFERS],
            filled: 0,
        }
    }
}

impl Batch {
    /// What was received last: where it came from, and datagrams of so many bytes each, the last of
    /// which may be shorter. The kernel joins those of one sender.
    pub fn trains(&self) -> impl Iterator<Item = (SocketAddr, &[u8], usize)> {
        let received = self.metas[..self.filled].iter().zip(&self.buffers);
        received.map(|(meta, buffer)| (meta.addr, &buffer[..meta.len], meta.stride.max(1)))
    }
}

impl Udp {
    /// Opens a socket on `port`, or on a free one where that is taken; for both families where the
    /// kernel has IPv6. `trains`: whether datagrams may be handed to the kernel joined.
    pub fn open(port: u16, trains: bool) -> io::Result<Self> {
        Self::bind(port, trains).or_else(|error| {
            info!(port, %error, "another UDP port must do");
            Self::bind(0, trains)
        })
    }

    fn bind(port: u16, trains: bool) -> io::Result<Self> {
        let trains = trains && kernel_sends_trains();
        let dual = || {
            let socket = Socket::new(Domain::IPV6, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
            socket.set_only_v6(false)?;
            socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
            Ok::<_, io::Error>(socket)
        };
        let (socket, dual) = match dual() {
            Ok(socket) => (socket, true),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Err(error),
            Err(error) => {
                info!(%error, "no IPv6 socket, so IPv4 alone");
                let socket =
                    Socket::new(Domain::IPV4, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
                socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
                (socket, false)
            }
        };
        let state = UdpSocketState::new((&socket).into())?;
        allow_fragments(&socket, dual)?;
        enlarge_buffers(&socket);
        // SAFETY: a Socket stays open, and the same, for as long as the AsyncFd owns it.
        let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        Ok(Self {
            socket: registered.map_err(io::Error::from)?,
            state,
            dual,
            single: AtomicBool::new(!trains),
        })
    }

    /// The port that peers should send to.
    pub fn port(&self) -> io::Result<u16> {
        let address = self.socket.get_ref().local_addr()?;
        let none = || io::Error::other("the UDP socket has no port");
        address.as_socket().map(|it| it.port()).ok_or_else(none)
    }

    /// Resolves when there may be datagrams.
    pub async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await?.retain_ready();
        Ok(())
    }

    /// Receives what is there into `batch`, which may be nothing. Returns whether there may be more.
    pub fn receive(&self, batch: &mut Batch) -> io::Result<bool> {
        let Batch {
            buffers,
            metas,
            filled,
        } = batch;
        *filled = 0;
        let mut buffers: Vec<_> = buffers
            .iter_mut()
            .map(|buffer| IoSliceMut::new(buffer))
            .collect();
        let received = self.socket.try_io(Interest::READABLE, |socket| {
            *filled = self.state.recv(socket.into(), &mut buffers, metas)?;
            // recvmmsg takes all that is there: where that was less than there is room for, asking again
            // would find nothing.
            match *filled < BUFFERS {
                true => Err(io::ErrorKind::WouldBlock.into()),
                false => Ok(()),
            }
        });
        match received {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            received => received.map(|()| true),
        }
    }

    /// Sends `contents`, datagrams of `segment` bytes each (the last may be shorter), to one address.
    ///
    /// A full socket buffer drops, as a network does.
    pub fn send(&self, to: SocketAddr, contents: &[u8], segment: usize) -> io::Result<()> {
        let to = match to {
            SocketAddr::V4(v4) if self.dual => {
                SocketAddr::from((v4.ip().to_ipv6_mapped(), v4.port()))
            }
            SocketAddr::V6(_) if !self.dual => return Err(io::ErrorKind::AddrNotAvailable.into()),
            other => other,
        };
        if contents.len() > segment && !self.single.load(Ordering::Relaxed) {
            match self.transmit(to, contents, Some(segment)) {
                // The way to this address is too small for the datagrams: alone, they may go as
                // fragments.
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {}
                // What a kernel or a card says that cannot split a train.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL)) => {
                    if !self.single.swap(true, Ordering::Relaxed) {
                        info!(%error, "UDP segmentation offload does not work here: sending one by one");
                    }
                }
                result => return result,
            }
        }
        for datagram in contents.chunks(segment.max(1)) {
            self.transmit(to, datagram, None)?;
        }
        Ok(())
    }

    /// How many bytes of `segment` each one train may hold.
    pub fn train(&self, segment: usize) -> usize {
        if self.single.load(Ordering::Relaxed) {
            return segment;
        }
        let segments = self
            .state
            .max_gso_segments()
            .min(TRAIN_MAX / segment.max(1))
            .max(1);
        segments * segment
    }

    fn transmit(
        &self,
        destination: SocketAddr,
        contents: &[u8],
        segment_size: Option<usize>,
    ) -> io::Result<()> {
        let transmit = Transmit {
            destination,
            ecn: None,
            contents,
            segment_size,
            src_ip: None,
        };
        match self.state.try_send(self.socket.get_ref().into(), &transmit) {
            // Neither says anything of the address.
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock
                    || error.raw_os_error() == Some(libc::ENOBUFS) =>
            {
                debug!(%destination, %error, "no room to send: dropped");
                Ok(())
            }
            result => result,
        }
    }
}

/// Linux 7.0 up to 7.1.4 may mangle the headers of trains whose datagrams are all equally long,
/// depending on the card (fixed by 78effd8 and 5f17ae0), and nobody notices but the peer.
fn kernel_sends_trains() -> bool {
    let release = rustix::system::uname();
    let Some(version) = release.release().to_str().ok().and_then(version) else {
        return true;
    };
    let sends = !((7, 0, 0)..(7, 1, 5)).contains(&version);
    if !sends {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            info!(
                ?version,
                "this kernel may mangle joined datagrams: sending one by one; 7.1.5 is mended"
            );
        });
    }
    sends
}

/// The first three numbers of a kernel's release, such as `6.12.48+deb13-amd64`.
fn version(release: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    let mut next = || numbers.next()?.ok();
    Some((next()?, next()?, next().unwrap_or(0)))
}

/// Makes room for bursts: as much as is wanted for root, and else as the host's limits allow.
fn enlarge_buffers(socket: &Socket) {
    let received = set_socket_recv_buffer_size_force(socket, SOCKET_BUFFER)
        .or_else(|_| set_socket_recv_buffer_size(socket, SOCKET_BUFFER));
    let sent = set_socket_send_buffer_size_force(socket, SOCKET_BUFFER)
        .or_else(|_| set_socket_send_buffer_size(socket, SOCKET_BUFFER));
    if let Err(error) = received.and(sent) {
        info!(%error, "the UDP socket keeps its small buffers");
    }
}

/// quinn-udp forbids fragments, for QUIC finds the path's MTU itself. WireGuard does not: on a path
/// too small for a full packet, fragments are better than silence. Routers make them of IPv4, as of
/// the kernel's own WireGuard; of IPv6 only the sender can, once it has heard of the path's MTU.
fn allow_fragments(socket: &Socket, dual: bool) -> io::Result<()> {
    set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::DONT)?;
    if dual {
        set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::WANT)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsRawFd, time::Duration};

    use super::*;

    #[tokio::test]
    async fn where_the_kernel_refuses_trains_datagrams_go_one_by_one() {
        let udp = Udp::open(0, true).unwrap();
        // A socket that sends without checksums may send no trains (net/ipv4/udp.c: udp_send_skb).
        let without: libc::c_int = 1;
        // SAFETY: the descriptor is open, and the kernel reads a number.
        let set = unsafe {
            libc::setsockopt(
                udp.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_NO_CHECK,
                (&raw const without).cast(),
                size_of_val(&without) as libc::socklen_t,
            )
        };
        assert_eq!(set, 0);
        let receiver = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        receiver
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let to = receiver.local_addr().unwrap();
        assert!(udp.train(100) >= 250);
        for _ in 0..2 {
            udp.send(to, &[7; 250], 100).unwrap();
            let lengths = [(); 3].map(|()| receiver.recv(&mut [0; 300]).unwrap());
            assert_eq!(lengths, [100, 100, 50]);
            assert_eq!(udp.train(100), 100, "it is not tried again");
        }
    }

    #[test]
    fn versions_of_kernels() {
        assert_eq!(version("6.12.48+deb13-amd64"), Some((6, 12, 48)));
        assert_eq!(version("7.1.4-pve"), Some((7, 1, 4)));
        assert_eq!(version("7.2-rc1"), Some((7, 2, 0)));
        assert_eq!(version("rolling"), None);
    }
}
