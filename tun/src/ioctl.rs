//! The TUN driver's ioctls, linux/if_tun.h, and that of namespaces, linux/nsfs.h.

use std::{
    ffi::{CStr, c_short},
    io, mem,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// TUNSETIFF: makes the descriptor a new TUN device of this name, in the calling thread's
/// namespace.
pub(crate) fn set_interface(tun: BorrowedFd, name: &CStr, flags: c_short) -> io::Result<()> {
    let bytes = name.to_bytes();
    if bytes.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: all zeroes is a valid ifreq: integers, byte arrays and a null pointer.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: the descriptor is open for as long as it is borrowed, and TUNSETIFF reads and writes
    // one ifreq, which `request` is.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// TUNGETIFF: the device's name, in whichever namespace it is now.
pub(crate) fn interface_name(tun: BorrowedFd) -> io::Result<String> {
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // SAFETY: as above; TUNGETIFF writes one ifreq.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNGETIFF, &mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let bytes = request
        .ifr_name
        .iter()
        .take_while(|&&byte| byte != 0)
        .map(|&byte| byte as u8);
    String::from_utf8(bytes.collect()).map_err(io::Error::other)
}

/// TUNGETDEVNETNS (Linux ≥ 5.2): the namespace that the device is in now.
pub(crate) fn device_netns(tun: BorrowedFd) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open for as long as it is borrowed; the ioctl takes no argument.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNGETDEVNETNS) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}

/// NS_GET_USERNS (Linux ≥ 4.9): the user namespace that owns a namespace.
pub(crate) fn owner(namespace: BorrowedFd) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open for as long as it is borrowed; the ioctl takes no argument.
    let result = unsafe { libc::ioctl(namespace.as_raw_fd(), libc::NS_GET_USERNS) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}
