//! The TUN device as the packet path sees it: packets in, packets out, death.

use std::{
    io::{self, IoSlice},
    os::fd::OwnedFd,
};

use nix::{errno::Errno, sys::uio::writev, unistd::read};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::trace;

/// The device has IFF_VNET_HDR: each packet follows a `struct virtio_net_hdr` (linux/virtio_net.h).
/// All zero says: one whole packet with its checksums done.
const VNET_HDR: [u8; 10] = [0; 10];
/// Room for the largest packet and its header.
pub const PACKET_ROOM: usize = VNET_HDR.len() + 65_536;

/// A TUN device that was made elsewhere; it lives on in whichever namespace it was moved to.
pub struct Device(AsyncFd<OwnedFd>);

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

impl Device {
    /// Takes a non-blocking TUN descriptor. Needs a tokio runtime.
    pub fn new(tun: OwnedFd) -> io::Result<Self> {
        // The death of the namespace shows as an error without being readable.
        let interest = Interest::READABLE | Interest::ERROR;
        // SAFETY: an OwnedFd stays open, and the same, for as long as the AsyncFd owns it.
        let registered = unsafe { AsyncFd::register_with_interest(tun, interest) };
        Ok(Self(registered.map_err(io::Error::from)?))
    }

    /// Resolves when there may be packets, or an end to them.
    pub async fn readable(&self) -> io::Result<()> {
        self.0
            .ready(Interest::READABLE | Interest::ERROR)
            .await?
            .retain_ready();
        Ok(())
    }

    /// The next packet that the container sent, read into `buffer` of [`PACKET_ROOM`] bytes;
    /// `None` when there is none now.
    pub fn receive<'a>(&self, buffer: &'a mut [u8]) -> Result<Option<&'a [u8]>, Closed> {
        // One readiness at a time: tokio's try_io takes a set of both for none.
        let mut attempt = |readiness| {
            self.0.try_io(readiness, |fd| {
                read(fd, &mut *buffer).map_err(io::Error::from)
            })
        };
        let received = match attempt(Interest::READABLE) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => attempt(Interest::ERROR),
            received => received,
        };
        match received {
            Ok(len) => Ok(buffer.get(VNET_HDR.len()..len)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // The kernel detached the device from its queue (drivers/net/tun.c).
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Err(Closed::NamespaceGone),
            Err(error) => Err(Closed::Failed(error)),
        }
    }

    /// Hands a packet to the container. One that the kernel refuses is dropped, as a network does:
    /// the interface may not be up yet, or its queue full.
    pub fn send(&self, packet: &[u8]) -> Result<(), Closed> {
        match writev(
            self.0.get_ref(),
            &[IoSlice::new(&VNET_HDR), IoSlice::new(packet)],
        ) {
            Ok(_) => Ok(()),
            Err(Errno::EBADFD) => Err(Closed::NamespaceGone),
            Err(errno) => {
                trace!(%errno, "the kernel refused a packet for the container");
                Ok(())
            }
        }
    }
}
