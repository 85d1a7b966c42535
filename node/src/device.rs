//! The TUN device as the packet path sees it: packets in, packets out, death.

use std::{
    io::{self, IoSlice},
    ops::Range,
    os::fd::{AsRawFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{errno::Errno, sys::uio::writev, unistd::read};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::{debug, info, trace};

use crate::offload::{self, Burst, Header, Joiner, PIECES_MAX};

/// Room for the largest packet and its header.
pub const PACKET_ROOM: usize = offload::HEADER + 65_536;

mod ioctl {
    /// What TUNSETOFFLOAD takes (linux/if_tun.h).
    pub const CSUM: libc::c_uint = 0x01;
    pub const TSO: libc::c_uint = 0x02 | 0x04;
    pub const USO: libc::c_uint = 0x20 | 0x40;

    nix::ioctl_write_int_bad!(
        /// Says what a reader of the device can take; its argument is the number itself.
        set_offload,
        libc::TUNSETOFFLOAD
    );
}

/// A TUN device that was made elsewhere; it lives on in whichever namespace it was moved to.
pub struct Device {
    tun: AsyncFd<OwnedFd>,
    /// Which bursts the kernel takes.
    tcp_bursts: AtomicBool,
    udp_bursts: AtomicBool,
}

/// Which packets the kernel may hand over, and take, joined. What it cannot do is not tried again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Offload {
    /// Of TCP and UDP; for UDP's, Linux ≥ 6.2.
    #[default]
    All,
    /// Of TCP alone.
    Tcp,
    /// None, and no datagrams to peers either: a packet a system call.
    None,
}

/// Why there will be no more packets.
#[derive(Debug, thiserror::Error)]
pub enum Closed {
    /// The namespace that the device lived in is gone.
    #[error("the container's network namespace is gone")]
    NamespaceGone,
    /// Something else.
    #[error("the TUN device failed: {0}")]
    Failed(#[from] io::Error),
}

/// A packet, or a burst, behind its header.
pub type Received<'a> = Result<Option<(Header, &'a mut [u8])>, Closed>;

impl Device {
    /// Takes a non-blocking TUN descriptor. Needs a tokio runtime.
    pub fn new(tun: OwnedFd, offload: Offload) -> io::Result<Self> {
        let offload = set_offload(&tun, offload);
        // The death of the namespace shows as an error without being readable.
        let interest = Interest::READABLE | Interest::ERROR;
        // SAFETY: an OwnedFd stays open, and the same, for as long as the AsyncFd owns it.
        let registered = unsafe { AsyncFd::register_with_interest(tun, interest) };
        Ok(Self {
            tun: registered.map_err(io::Error::from)?,
            tcp_bursts: (offload != Offload::None).into(),
            udp_bursts: (offload == Offload::All).into(),
        })
    }

    /// Resolves when there may be packets, or an end to them.
    pub async fn readable(&self) -> io::Result<()> {
        self.tun
            .ready(Interest::READABLE | Interest::ERROR)
            .await?
            .retain_ready();
        Ok(())
    }

    /// What the container sent next, read into `buffer` of [`PACKET_ROOM`] bytes; `None` when there
    /// is nothing that [`Device::readable`] told of.
    pub fn receive<'a>(&self, buffer: &'a mut [u8]) -> Received<'a> {
        // One readiness at a time: tokio's try_io takes a set of both for none.
        let mut attempt = |readiness| {
            self.tun.try_io(readiness, |fd| {
                read(fd, &mut *buffer).map_err(io::Error::from)
            })
        };
        let received = match attempt(Interest::READABLE) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => attempt(Interest::ERROR),
            received => received,
        };
        Self::received(received, buffer)
    }

    /// The same, without being told: what the container's kernel answers by itself is there as soon as it
    /// was handed the question.
    pub fn receive_untold<'a>(&self, buffer: &'a mut [u8]) -> Received<'a> {
        let received = read(&self.tun, &mut *buffer).map_err(io::Error::from);
        Self::received(received, buffer)
    }

    fn received(received: io::Result<usize>, buffer: &mut [u8]) -> Received<'_> {
        match received {
            Ok(len) => Ok(buffer
                .get_mut(..len)
                .and_then(<[u8]>::split_first_chunk_mut)
                .map(|(header, packet)| (Header::from_bytes(*header), packet))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // The kernel detached the device from its queue (drivers/net/tun.c).
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Err(Closed::NamespaceGone),
            Err(error) => Err(Closed::Failed(error)),
        }
    }

    /// Hands a packet to the container. One that the kernel refuses is dropped, as a network does:
    /// the interface may not be up yet, or its queue full.
    pub fn send(&self, packet: &[u8]) -> Result<(), Closed> {
        let header = Header::default().to_bytes();
        match self.write(&[IoSlice::new(&header), IoSlice::new(packet)])? {
            Ok(()) => {}
            Err(errno) => trace!(%errno, "the kernel refused a packet for the container"),
        }
        Ok(())
    }

    /// Hands over packets at these places in `bytes`, joined where the kernel takes them joined.
    pub fn send_all(
        &self,
        bytes: &mut [u8],
        packets: &mut Vec<Range<usize>>,
        joiner: &mut Joiner,
    ) -> Result<(), Closed> {
        if packets.len() < 2 || !self.tcp_bursts.load(Ordering::Relaxed) {
            return packets
                .drain(..)
                .try_for_each(|packet| self.send(&bytes[packet]));
        }
        let udp = self.udp_bursts.load(Ordering::Relaxed);
        for packet in packets.drain(..) {
            joiner.push(bytes, packet, udp);
        }
        joiner.drain(bytes, |header, bytes, parts| {
            self.send_parts(header, parts.iter().map(|part| &bytes[part.clone()]))
        })
    }

    /// Hands over a packet, or a burst, in parts: at most [`PIECES_MAX`].
    pub fn send_parts<'a>(
        &self,
        header: Header,
        parts: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<(), Closed> {
        let bursts = if header.is_udp_burst() {
            &self.udp_bursts
        } else {
            &self.tcp_bursts
        };
        if header.is_burst() && !bursts.load(Ordering::Relaxed) {
            return self.send_cut(header, parts);
        }
        let head = header.to_bytes();
        let mut slices = [IoSlice::new(&[]); 1 + PIECES_MAX];
        slices[0] = IoSlice::new(&head);
        let mut count = 1;
        for (slice, part) in slices[1..].iter_mut().zip(parts.clone()) {
            *slice = IoSlice::new(part);
            count += 1;
        }
        match self.write(&slices[..count])? {
            Ok(()) => Ok(()),
            // What kernels say that do not take the burst for what it is.
            Err(errno @ (Errno::EINVAL | Errno::EOPNOTSUPP)) if header.is_burst() => {
                if bursts.swap(false, Ordering::Relaxed) {
                    info!(%errno, udp = header.is_udp_burst(), "the kernel takes no bursts for the container: sending packet by packet");
                }
                self.send_cut(header, parts)
            }
            Err(errno) => {
                trace!(%errno, "the kernel refused a packet for the container");
                Ok(())
            }
        }
    }

    fn send_cut<'a>(
        &self,
        header: Header,
        parts: impl Iterator<Item = &'a [u8]>,
    ) -> Result<(), Closed> {
        let mut whole = parts.collect::<Vec<_>>().concat();
        let mut result = Ok(());
        match Burst::new(header, &mut whole) {
            Ok(burst) => burst.packets(&mut Vec::new(), |packet| {
                if result.is_ok() {
                    result = self.send(packet);
                }
            }),
            Err(misfit) => debug!(%misfit, "dropped"),
        }
        result
    }

    fn write(&self, slices: &[IoSlice]) -> Result<Result<(), Errno>, Closed> {
        match writev(self.tun.get_ref(), slices) {
            Ok(_) => Ok(Ok(())),
            Err(Errno::EBADFD) => Err(Closed::NamespaceGone),
            Err(errno) => Ok(Err(errno)),
        }
    }
}

/// Tells the kernel to hand over bursts, as far as it can and `wanted` goes; returns how far.
fn set_offload(tun: &OwnedFd, wanted: Offload) -> Offload {
    let steps = [
        (Offload::All, ioctl::CSUM | ioctl::TSO | ioctl::USO),
        (Offload::Tcp, ioctl::CSUM | ioctl::TSO),
    ];
    let from = steps.iter().position(|(offload, _)| *offload == wanted);
    for (offload, flags) in &steps[from.unwrap_or(steps.len())..] {
        // SAFETY: the descriptor is open for as long as it is borrowed, and the argument is a number.
        match unsafe { ioctl::set_offload(tun.as_raw_fd(), *flags as libc::c_int) } {
            Ok(_) => return *offload,
            Err(errno) => info!(%errno, ?offload, "the TUN device cannot do that"),
        }
    }
    Offload::None
}

#[cfg(test)]
pub mod tests {
    use std::thread;

    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};

    use super::*;
    use crate::packet::{self, IPV4_HEADER};

    /// What stands in for a TUN, and the container's end of it.
    pub fn stand_in() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_NONBLOCK,
        )
        .unwrap()
    }

    /// Needs a tokio runtime.
    fn device() -> (Device, OwnedFd) {
        let (tun, container) = stand_in();
        // SAFETY: an OwnedFd stays open, and the same, for as long as the AsyncFd owns it.
        let tun = unsafe { AsyncFd::register(tun) };
        let device = Device {
            tun: tun.unwrap(),
            tcp_bursts: true.into(),
            udp_bursts: true.into(),
        };
        (device, container)
    }

    #[tokio::test]
    async fn an_answer_is_read_before_the_loop_tells_of_it() {
        let (device, container) = device();
        let mut room = [0; PACKET_ROOM];
        assert!(device.receive_untold(&mut room).unwrap().is_none());
        let mut answer = Header::default().to_bytes().to_vec();
        answer.extend(b"answer");
        nix::unistd::write(&container, &answer).unwrap();
        assert!(device.receive(&mut room).unwrap().is_none(), "not told yet");
        let (_, packet) = device.receive_untold(&mut room).unwrap().unwrap();
        assert_eq!(packet, b"answer");

        // What nobody read untold is told of.
        nix::unistd::write(&container, &answer).unwrap();
        device.readable().await.unwrap();
        let (_, packet) = device.receive(&mut room).unwrap().unwrap();
        assert_eq!(packet, b"answer");
    }

    /// From now on the kernel refuses this thread writes of so many parts and more, as kernels do that
    /// take no bursts.
    fn refuse_writes_of_parts(count: u32) {
        // In struct seccomp_data (linux/seccomp.h): the number of the call, and its third argument.
        const CALL: u32 = 0;
        const THIRD: u32 = 32;
        let step = |code, k, jt, jf| libc::sock_filter {
            code: code as u16,
            jt,
            jf,
            k,
        };
        let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
        let jump = libc::BPF_JMP | libc::BPF_K;
        let end = libc::BPF_RET | libc::BPF_K;
        let mut filter = [
            step(load, CALL, 0, 0),
            step(jump | libc::BPF_JEQ, libc::SYS_writev as u32, 0, 3),
            step(load, THIRD, 0, 0),
            step(jump | libc::BPF_JGE, count, 0, 1),
            step(end, libc::SECCOMP_RET_ERRNO | libc::EINVAL as u32, 0, 0),
            step(end, libc::SECCOMP_RET_ALLOW, 0, 0),
        ];
        let program = libc::sock_fprog {
            len: filter.len() as u16,
            filter: filter.as_mut_ptr(),
        };
        // SAFETY: the kernel reads the program, which outlives the call.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            let mode = libc::SECCOMP_SET_MODE_FILTER;
            assert_eq!(libc::syscall(libc::SYS_seccomp, mode, 0, &program), 0);
        }
    }

    #[test]
    fn where_the_kernel_refuses_bursts_packets_go_one_by_one() {
        let parts: Vec<Vec<u8>> = (0..3)
            .map(|number: u8| {
                let [from, to] = ["100.64.0.1:7", "100.64.0.2:7"].map(|it| it.parse().unwrap());
                packet::udp(from, to, &[number; 100]).unwrap()
            })
            .collect();
        let wanted = parts.clone();
        // The filter is this thread's for good.
        let test = move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let _entered = runtime.enter();
            let (device, container) = device();
            refuse_writes_of_parts(3);
            for _ in 0..2 {
                let mut bytes = parts.concat();
                let len = parts[0].len();
                let mut packets: Vec<_> = (0..3).map(|at| at * len..(at + 1) * len).collect();
                let mut joiner = Joiner::default();
                device
                    .send_all(&mut bytes, &mut packets, &mut joiner)
                    .unwrap();
                for packet in &wanted {
                    let mut room = vec![0; 300];
                    let len = recv(container.as_raw_fd(), &mut room, MsgFlags::empty()).unwrap();
                    let (header, received) = room[..len].split_at(offload::HEADER);
                    assert_eq!(header, Header::default().to_bytes());
                    // A packet of a burst has its number in the header.
                    assert_eq!(received[IPV4_HEADER..], packet[IPV4_HEADER..]);
                }
                assert!(
                    !device.udp_bursts.load(Ordering::Relaxed),
                    "it is not tried again"
                );
                assert!(
                    device.tcp_bursts.load(Ordering::Relaxed),
                    "nobody refused those"
                );
            }
        };
        thread::spawn(test).join().unwrap();
    }
}
