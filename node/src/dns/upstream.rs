//! Other servers: which ones there are, and asking them.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::{Duration, SystemTime},
};

use hickory_proto::rr::Name;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::{Instant, timeout_at},
};

use super::{
    message::{Request, is_failure, is_truncated},
    peers::Peers,
    zone::Way,
};

/// How long one server has time before the next is asked.
const TRY: Duration = Duration::from_secs(2);
/// How long all servers together have time; clients wait 5 s by default (resolv.conf(5)).
const PATIENCE: Duration = Duration::from_secs(5);
/// A datagram can get lost, so servers are asked again while there is time.
const ROUNDS: usize = 3;

/// The servers that the host itself asks.
#[derive(Debug)]
pub struct Upstreams {
    path: PathBuf,
    /// When the file was last written, as of when it was read.
    written: Option<SystemTime>,
    servers: Vec<SocketAddr>,
    /// Suffixes of names that they do not know but another resolver of the container does.
    elsewhere: Vec<Name>,
}

impl Upstreams {
    /// Those of the host's resolv.conf. The daemon lives in the host's network namespace, so a
    /// server on loopback will do.
    pub fn host() -> Self {
        Self::of("/etc/resolv.conf")
    }

    fn of(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            written: None,
            servers: Vec::new(),
            elsewhere: Vec::new(),
        }
    }

    /// The same, but not for names below these suffixes. A suffix that is no name is left out.
    pub fn except(mut self, suffixes: &[String]) -> Self {
        self.elsewhere = suffixes
            .iter()
            .filter_map(|suffix| Name::from_ascii(suffix).ok())
            .collect();
        for suffix in &mut self.elsewhere {
            suffix.set_fqdn(true);
        }
        self
    }

    /// Whether a name is to be left to another resolver of the container.
    pub fn leaves(&self, name: &Name) -> bool {
        self.elsewhere.iter().any(|suffix| suffix.zone_of(name))
    }

    /// The servers; reads the file again if it was written since.
    pub fn servers(&mut self) -> &[SocketAddr] {
        let written = fs::metadata(&self.path).and_then(|file| file.modified());
        let read = match written {
            Ok(written) if self.written == Some(written) => return &self.servers,
            Ok(written) => fs::read_to_string(&self.path).map(|text| (written, text)),
            Err(error) => Err(error),
        };
        match read {
            Ok((written, text)) => {
                self.written = Some(written);
                self.servers = nameservers(&text);
            }
            Err(error) => {
                tracing::debug!(path = %self.path.display(), %error, "the host's DNS servers are unknown");
                self.written = None;
                self.servers.clear();
            }
        }
        &self.servers
    }
}

/// The servers that a resolv.conf(5) names.
fn nameservers(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let address = words
                .next()
                .filter(|word| *word == "nameserver")
                .and(words.next())?;
            match address.parse::<IpAddr>() {
                Ok(ip) => Some(SocketAddr::new(ip, 53)),
                Err(_) => {
                    tracing::debug!(
                        address,
                        "skipped a DNS server of the host that has no plain address"
                    );
                    None
                }
            }
        })
        .collect()
}

/// Asks servers in turn until one answers; `None` if none does in time.
///
/// What a server cuts for UDP is asked for again by TCP if `whole` is set.
pub async fn ask(
    servers: &[Way],
    peers: &Peers,
    request: &Request,
    whole: bool,
) -> Option<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    let mut failure = None;
    for round in 0..ROUNDS {
        for (at, server) in servers.iter().enumerate() {
            let until = deadline.min(Instant::now() + TRY);
            match timeout_at(until, ask_one(*server, peers, request, whole)).await {
                Ok(Ok(answer)) if is_failure(&answer) => {
                    failure.get_or_insert(answer);
                    if at + 1 == servers.len() {
                        return failure;
                    }
                }
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(error)) => {
                    tracing::debug!(?server, %error, round, "a DNS server cannot be asked");
                }
                Err(_) => tracing::debug!(?server, round, "a DNS server does not answer"),
            }
            if Instant::now() >= deadline {
                return failure;
            }
        }
    }
    failure
}

async fn ask_one(
    server: Way,
    peers: &Peers,
    request: &Request,
    whole: bool,
) -> io::Result<Vec<u8>> {
    let answer = match server {
        Way::Host(server) => ask_udp(server, request).await?,
        Way::Peer { server, us } => peers.ask(server, us, request).await?,
    };
    match server {
        Way::Host(server) if whole && is_truncated(&answer) => ask_tcp(server, request).await,
        Way::Peer { .. } if whole && is_truncated(&answer) => Err(io::Error::other(
            "its answer is too long for UDP, and peers are not asked by TCP yet",
        )),
        _ => Ok(answer),
    }
}

async fn ask_udp(server: SocketAddr, request: &Request) -> io::Result<Vec<u8>> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // A new socket for each question: the kernel's random port is as good as the random id
    // against forged answers (RFC 5452), and connected it hears only the server.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    let id = rand::random();
    socket.send(&request.with_id(id)).await?;
    let mut answer = Vec::with_capacity(request.udp_room());
    loop {
        answer.clear();
        socket.recv_buf(&mut answer).await?;
        if request.is_answered_by(id, &answer) {
            return Ok(answer);
        }
        tracing::debug!(%server, "ignored an answer to another question");
    }
}

async fn ask_tcp(server: SocketAddr, request: &Request) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let id = rand::random();
    let query = request.with_id(id);
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    stream
        .write_all(&[&length.to_be_bytes()[..], &query].concat())
        .await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    if request.is_answered_by(id, &answer) {
        Ok(answer)
    } else {
        Err(io::Error::other("it answered another question"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn resolv_conf() {
        let text = "# nameserver 1.1.1.1\nsearch a b\n nameserver\t127.0.0.53 # stub\n\
                    nameserver fe80::1%eth0\nnameserver 2606:4700::1111\nnameservers 9.9.9.9\nnameserver";
        let expected = ["127.0.0.53:53", "[2606:4700::1111]:53"].map(|s| s.parse().unwrap());
        assert_eq!(nameservers(text), expected);
    }

    #[test]
    fn the_file_is_read_again_when_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let mut upstreams = Upstreams::of(&path).except(&["dns.podman".to_owned()]);
        for (name, left) in [
            ("web.DNS.podman.", true),
            ("dns.podman.", true),
            ("podman.", false),
        ] {
            assert_eq!(upstreams.leaves(&name.parse().unwrap()), left, "{name}");
        }
        assert!(upstreams.servers().is_empty());
        for (age, server) in [(3, "192.0.2.1"), (2, "192.0.2.2")] {
            fs::write(&path, format!("nameserver {server}\n")).unwrap();
            let file = fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age))
                .unwrap();
            assert_eq!(
                upstreams.servers(),
                [SocketAddr::new(server.parse().unwrap(), 53)]
            );
        }
        fs::remove_file(&path).unwrap();
        assert!(upstreams.servers().is_empty());
    }

    proptest! {
        #[test]
        fn no_file_panics(text in any::<String>(), word in "nameserver .{0,30}") {
            nameservers(&text);
            nameservers(&word);
        }
    }
}
