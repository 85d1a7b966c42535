//! Map changes that come in a row are taken together: to be woken for one costs more than to apply it, and
//! a host's nodes all hear of each.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use nix::{setsockopt_impl, sockopt_impl, sys::socket::setsockopt};
use tokio::time::Instant;
use tracing::warn;

/// Changes that may come in a row and are taken as they come.
const BURST: u32 = 16;
/// For how long those after them gather: what a change may be late by.
const GATHER: Duration = Duration::from_millis(50);
/// More is not left to gather: it is the beginning of a long message.
const ENOUGH: i32 = 16 << 10;

sockopt_impl!(
    ReceiveLowWater,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_RCVLOWAT,
    i32
);

/// When to let changes gather.
#[derive(Debug)]
pub struct Pace {
    /// Each change moves this on by [`GATHER`], from the present where that is later.
    ahead: Instant,
}

impl Pace {
    pub fn new(now: Instant) -> Self {
        Self { ahead: now }
    }

    /// A message came.
    pub fn note(&mut self, now: Instant) {
        let most = now + (BURST + 1) * GATHER;
        self.ahead = (self.ahead.max(now) + GATHER).min(most);
    }

    /// Until when the next ones should gather.
    pub fn gather(&self, now: Instant) -> Option<Instant> {
        let until = self.ahead - BURST * GATHER;
        (until > now).then_some(until)
    }
}

/// Another handle of the socket that the control server's words arrive at.
#[derive(Debug)]
pub struct Socket(OwnedFd);

/// While this lives, what arrives does not wake anybody unless it is a lot; who reads is given it.
#[derive(Debug)]
pub struct Hushed<'a>(&'a Socket);

impl Socket {
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        socket.as_fd().try_clone_to_owned().map(Self)
    }

    pub fn hush(&self) -> io::Result<Hushed<'_>> {
        setsockopt(&self.0, ReceiveLowWater, &ENOUGH)?;
        Ok(Hushed(self))
    }
}

impl Drop for Hushed<'_> {
    fn drop(&mut self) {
        // Linux wakes who waits if something has gathered.
        if let Err(error) = setsockopt(&self.0.0, ReceiveLowWater, &1) {
            warn!(%error, "map changes may come late");
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        time::timeout,
    };

    use super::*;

    #[test]
    fn a_burst_is_taken_at_once_and_what_follows_together() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        for _ in 0..BURST {
            pace.note(begin);
            assert_eq!(pace.gather(begin), None);
        }
        // However many more there are, none waits for longer.
        for _ in 0..1000 {
            pace.note(begin);
            assert_eq!(pace.gather(begin), Some(begin + GATHER));
        }
        assert_eq!(pace.gather(begin + GATHER), None);
        // Who is quiet for a while may say as much at once again.
        let later = begin + 2 * BURST * GATHER;
        for _ in 0..BURST {
            pace.note(later);
            assert_eq!(pace.gather(later), None);
        }
    }

    #[test]
    fn what_comes_seldom_never_waits() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        for _ in 0..1000 {
            pace.note(now);
            assert_eq!(pace.gather(now), None);
            now += GATHER;
        }
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await;
        (ours.unwrap(), listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn nobody_is_woken_until_the_hush_ends() {
        let (mut ours, mut theirs) = pair().await;
        let socket = Socket::of(&ours).unwrap();
        let hushed = socket.hush().unwrap();
        theirs.write_all(b"word").await.unwrap();
        let woken = timeout(Duration::from_millis(100), ours.readable());
        woken.await.unwrap_err();
        drop(hushed);
        ours.readable().await.unwrap();
        let mut word = [0; 4];
        ours.read_exact(&mut word).await.unwrap();
        assert_eq!(&word, b"word");
    }

    #[tokio::test]
    async fn long_messages_and_the_end_are_heard_through_it() {
        let (ours, mut theirs) = pair().await;
        let socket = Socket::of(&ours).unwrap();
        let _hushed = socket.hush().unwrap();
        theirs.write_all(&[0; ENOUGH as usize]).await.unwrap();
        ours.readable().await.unwrap();

        let (ours, theirs) = pair().await;
        let socket = Socket::of(&ours).unwrap();
        let _hushed = socket.hush().unwrap();
        drop(theirs);
        ours.readable().await.unwrap();
    }
}
