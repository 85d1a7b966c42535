//! A socket that systemd listens on and hands over (sd_listen_fds(3)).

use std::{
    env, io,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    process,
};

use rustix::{
    io::{FdFlags, fcntl_setfd},
    net::{SocketType, sockopt},
};

/// SD_LISTEN_FDS_START
const FIRST: i32 = 3;

/// The one that this process was started with, if it was. To be called once, before any descriptor is
/// opened.
pub fn socket() -> io::Result<Option<UnixListener>> {
    if !is_for(process::id(), |name| env::var(name).ok()) {
        return Ok(None);
    }
    // SAFETY: systemd has opened this descriptor for us and for nobody else in this process, which says
    // so by the process's id; and we take it once.
    let socket = unsafe { OwnedFd::from_raw_fd(FIRST) };
    fcntl_setfd(&socket, FdFlags::CLOEXEC)?;
    let listens = sockopt::socket_type(&socket)? == SocketType::STREAM
        && sockopt::socket_acceptconn(&socket)?;
    if !listens {
        return Err(io::Error::other(
            "it is no listening stream socket: take the one of packaging/systemd",
        ));
    }
    Ok(Some(socket.into()))
}

/// Whether these variables hand one socket to this process.
fn is_for(process: u32, variable: impl Fn(&str) -> Option<String>) -> bool {
    let number = |name| variable(name)?.parse::<u32>().ok();
    number("LISTEN_PID") == Some(process) && number("LISTEN_FDS") == Some(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_taken_by_the_process_that_it_is_for() {
        let says = |pid: &str, sockets: &str| {
            is_for(7, |name| match name {
                "LISTEN_PID" => Some(pid.to_owned()),
                "LISTEN_FDS" => Some(sockets.to_owned()),
                _ => None,
            })
        };
        assert!(says("7", "1"));
        // Another's, left in the environment; or none of ours.
        assert!(!says("8", "1") && !says("", "1") && !says("7", "0") && !says("7", "2"));
        assert!(!is_for(7, |_| None));
    }
}
