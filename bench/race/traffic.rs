//! What apps send. All of it is a pattern that the receiver compares byte by byte.

use std::{
    ffi::OsString,
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        LazyLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket,
    sockopt::{RcvBufForce, TcpCongestion},
};
use tailnode_tests::Namespace;

use crate::machine::Machine;

/// Bytes of one call.
const CHUNK: usize = 128 * 1024;
/// After so many bytes the pattern begins again: a prime, so that no segment, page or buffer that is
/// lost, doubled or swapped for another leaves the same bytes in its place.
const PERIOD: usize = 262_139;
/// Nothing that moves stands still for so long.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(30));
/// Bytes of a datagram.
pub const DATAGRAM: usize = 1200;
/// How often a ping is sent.
const PING_EVERY: Duration = Duration::from_millis(10);
/// When a ping is lost; it then counts as having taken so long.
const PING_LOST: Duration = Duration::from_secs(1);

/// From any byte of the first period on, there are [`CHUNK`] more.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    let mut pattern: Vec<u8> = (0..PERIOD)
        .map(|_| {
            // xorshift64 (Marsaglia, 2003)
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect();
    pattern.extend_from_within(..CHUNK);
    pattern
});

fn pattern(position: u64, length: usize) -> &'static [u8] {
    let start = (position % PERIOD as u64) as usize;
    &PATTERN[start..start + length]
}

/// Streams from one to the other, as fast as they go.
pub struct Tcp {
    /// How many at once.
    pub streams: usize,
    /// How long they send.
    pub time: Duration,
    /// The congestion control; `None`: the host's default.
    pub congestion: Option<&'static str>,
    /// The one that was connected to sends.
    pub back: bool,
}

/// What arrived, and from the first to the last byte of it.
pub struct Carried {
    pub bytes: u64,
    pub took: Duration,
}

impl Carried {
    pub fn gigabytes(&self) -> f64 {
        self.bytes as f64 / 1e9
    }

    pub fn gigabits_per_second(&self) -> f64 {
        self.gigabytes() * 8.0 / self.took.as_secs_f64()
    }
}

impl Tcp {
    /// Runs it. An error: the streams broke off. Panics when other bytes arrive than were sent.
    pub fn run(&self, from: &Machine, to: &Machine) -> io::Result<Carried> {
        let listener = to.inside().run(|| {
            let listener = TcpListener::bind((to.address, 0))?;
            self.control(&listener)?;
            Ok(listener)
        })?;
        let at = listener.local_addr()?;
        let pairs: Vec<_> = (0..self.streams)
            .map(|_| {
                let near = from.inside().run(|| connect(at))?;
                self.control(&near)?;
                let (far, _) = listener.accept()?;
                Ok(if self.back { (far, near) } else { (near, far) })
            })
            .collect::<io::Result<_>>()?;
        let begun = Instant::now();
        let until = begun + self.time;
        let bytes = thread::scope(|scope| {
            let running: Vec<_> = pairs
                .iter()
                .map(|(sender, receiver)| {
                    let sending = scope.spawn(move || send_until(sender, until));
                    (sending, scope.spawn(move || receive(receiver)))
                })
                .collect();
            let mut total = 0;
            for (sending, receiving) in running {
                let sent = sending.join().expect("the sender")?;
                let received = receiving.join().expect("other bytes arrived")?;
                assert_eq!(sent, received, "other bytes arrived: so many were sent");
                total += received;
            }
            io::Result::Ok(total)
        })?;
        Ok(Carried {
            bytes,
            took: begun.elapsed(),
        })
    }

    fn control(&self, socket: &impl std::os::fd::AsFd) -> io::Result<()> {
        if let Some(name) = self.congestion {
            setsockopt(socket, TcpCongestion, &OsString::from(name))?;
        }
        Ok(())
    }
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))?;
    stream.set_read_timeout(PATIENCE)?;
    stream.set_write_timeout(PATIENCE)?;
    Ok(stream)
}

fn send_until(mut stream: &TcpStream, until: Instant) -> io::Result<u64> {
    stream.set_write_timeout(PATIENCE)?;
    let mut sent = 0;
    while Instant::now() < until {
        stream.write_all(pattern(sent, CHUNK))?;
        sent += CHUNK as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(sent)
}

fn receive(mut stream: &TcpStream) -> io::Result<u64> {
    stream.set_read_timeout(PATIENCE)?;
    let mut buffer = vec![0; CHUNK];
    let mut received = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(received),
            count => {
                assert!(
                    buffer[..count] == *pattern(received, count),
                    "other bytes arrived than were sent, after {received}"
                );
                received += count as u64;
            }
        }
    }
}

/// Datagrams of [`DATAGRAM`] bytes.
pub struct Udp {
    /// How many a second; `None`: as many as the sender can.
    pub rate: Option<f64>,
    /// How long.
    pub time: Duration,
}

/// What arrived of what was sent.
pub struct Delivered {
    pub sent: u64,
    pub received: u64,
    pub took: Duration,
}

impl Udp {
    /// Runs it. Panics when a datagram arrives that was not sent.
    pub fn run(&self, from: &Machine, to: &Machine) -> io::Result<Delivered> {
        const BUFFER: usize = 4 << 20;
        let bind = |machine: &Machine| {
            let address = machine.address;
            machine.inside().run(move || UdpSocket::bind((address, 0)))
        };
        let (sender, receiver) = (bind(from)?, bind(to)?);
        // How fast the app is awoken is not what is measured.
        setsockopt(&receiver, RcvBufForce, &BUFFER)?;
        receiver.set_read_timeout(Some(Duration::from_millis(100)))?;
        sender.connect(receiver.local_addr()?)?;
        let over = AtomicBool::new(false);
        let begun = Instant::now();
        thread::scope(|scope| {
            let receiving = scope.spawn(|| take_datagrams(&receiver, &over));
            let sent = self.send(&sender, begun);
            let took = begun.elapsed();
            // What is on the way may arrive.
            thread::sleep(Duration::from_millis(300));
            over.store(true, Ordering::Relaxed);
            let received = receiving.join().expect("other datagrams arrived")?;
            let sent = sent?;
            assert!(received <= sent, "more datagrams arrived than were sent");
            Ok(Delivered {
                sent,
                received,
                took,
            })
        })
    }

    fn send(&self, socket: &UdpSocket, begun: Instant) -> io::Result<u64> {
        let mut datagram = [0; DATAGRAM];
        let mut sent = 0;
        loop {
            let elapsed = begun.elapsed();
            if elapsed >= self.time {
                return Ok(sent);
            }
            let due = match self.rate {
                Some(rate) => (rate * elapsed.as_secs_f64()) as u64,
                None => sent + 64,
            };
            if due <= sent {
                thread::sleep(Duration::from_micros(300));
            }
            while sent < due {
                write_datagram(&mut datagram, sent);
                match socket.send(&datagram) {
                    // Its own queue is full: lost, like any other.
                    Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                    result => {
                        result?;
                    }
                }
                sent += 1;
            }
        }
    }
}

fn write_datagram(datagram: &mut [u8; DATAGRAM], number: u64) {
    let (head, body) = datagram.split_at_mut(8);
    head.copy_from_slice(&number.to_le_bytes());
    body.copy_from_slice(pattern(number, DATAGRAM - 8));
}

fn take_datagrams(socket: &UdpSocket, over: &AtomicBool) -> io::Result<u64> {
    let mut buffer = [0; DATAGRAM + 1];
    let mut expected = [0; DATAGRAM];
    let mut received = 0;
    while !over.load(Ordering::Relaxed) {
        let length = match socket.recv(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            result => result?,
        };
        let number = u64::from_le_bytes(buffer[..8].try_into().expect("eight bytes"));
        write_datagram(&mut expected, number);
        assert!(
            buffer[..length] == expected,
            "a datagram arrived that was not sent"
        );
        received += 1;
    }
    Ok(received)
}

/// Round trips of pings, one each 10 ms for as long as `time`, sorted. One that is lost counts as
/// one of 1 s.
pub fn pings(from: &Machine, to: &Machine, time: Duration) -> io::Result<Vec<Duration>> {
    let (family, protocol, echo) = match to.address {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128),
    };
    let socket: UdpSocket = from.inside().run(|| {
        let flags = SockFlag::SOCK_CLOEXEC;
        Ok(socket(family, SockType::Datagram, flags, protocol)?.into())
    })?;
    socket.connect((to.address, 0))?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let count = (time.as_micros() / PING_EVERY.as_micros()) as usize;
    let begun = Instant::now();
    let due = |number: usize| begun + PING_EVERY * number as u32;
    thread::scope(|scope| {
        // Each at its time, whether or not the one before has been answered: else a long wait would
        // hide those that should have been sent during it.
        let sending = scope.spawn(|| {
            (0..count)
                .map(|number| {
                    thread::sleep(due(number).saturating_duration_since(Instant::now()));
                    let [high, low] = (number as u16).to_be_bytes();
                    let at = Instant::now();
                    socket.send(&[&[echo, 0, 0, 0, 0, 0, high, low], &[0x55; 56][..]].concat())?;
                    Ok(at)
                })
                .collect::<io::Result<Vec<_>>>()
        });
        let mut answers = vec![None; count];
        let end = due(count) + PING_LOST;
        let mut answer = [0; 128];
        while Instant::now() < end && answers.iter().any(Option::is_none) {
            match socket.recv(&mut answer) {
                Ok(length) if length >= 8 => {
                    let number = u16::from_be_bytes([answer[6], answer[7]]);
                    if let Some(slot) = answers.get_mut(usize::from(number)) {
                        slot.get_or_insert(Instant::now());
                    }
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        let sent = sending.join().expect("the sender of pings")?;
        let mut times: Vec<_> = sent
            .into_iter()
            .zip(answers)
            .map(|(at, answer)| answer.map_or(PING_LOST, |answer| answer - at))
            .collect();
        times.sort();
        Ok(times)
    })
}

/// Serves a web page of one byte for as long as the namespace's process lives.
pub fn serve_page(machine: &Machine) -> io::Result<SocketAddr> {
    let listener = machine
        .inside()
        .run(|| TcpListener::bind((machine.address, 0)))?;
    let at = listener.local_addr()?;
    thread::spawn(move || -> io::Result<()> {
        loop {
            let (mut stream, _) = listener.accept()?;
            let mut request = [0; 256];
            let asked = stream.read(&mut request)?;
            if request[..asked].starts_with(b"GET / ") {
                stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\n!")?;
            }
        }
    });
    Ok(at)
}

/// Gets the page: what a container does first.
pub fn get_page(from: &Namespace, at: SocketAddr) -> io::Result<()> {
    let mut stream = from.run(|| TcpStream::connect(at))?;
    stream.set_read_timeout(PATIENCE)?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    assert!(page.ends_with("\r\n\r\n!"), "other bytes arrived: {page}");
    Ok(())
}
