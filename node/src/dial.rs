//! The way to a server: addresses, TCP, TLS, and the HTTP upgrade by which control server and
//! relays begin their own protocols.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, client::conn::http1, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::{TcpStream, lookup_host},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::{either::Either, task::AbortOnDropHandle};
use tracing::warn;

/// How long one address may take to connect.
const CONNECT: Duration = Duration::from_secs(5);
/// How long an address keeps its lead over the next (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);
/// An idle connection is asked after so long whether the other end is still there, by the kernel.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// And again so often while it does not answer.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// The other end is gone when it has confirmed nothing for so long that was sent to it.
const GONE: Duration = Duration::from_secs(20);
/// Addresses tried of one host.
const MAX_ADDRESSES: usize = 8;
/// What is shown of an error page.
const MAX_ERROR: usize = 200;

/// A connection, with TLS or without.
pub type Stream = Either<TcpStream, TlsStream<TcpStream>>;

/// Why a server cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its name is not found.
    #[error("cannot find the address of {host} ({source}): does DNS work on this host?")]
    Lookup {
        /// The name.
        host: String,
        /// Why.
        source: io::Error,
    },
    /// None of its addresses answers.
    #[error("cannot connect to {host} port {port}: {source}")]
    Connect {
        /// The name.
        host: String,
        /// The port.
        port: u16,
        /// Why the last address failed.
        source: io::Error,
    },
    /// Its name cannot be in a certificate.
    #[error("{host} is no name that a certificate can have")]
    Name {
        /// The name.
        host: String,
    },
    /// It did not prove who it is.
    #[error(
        "no trusted TLS connection to {host}: {source} (a private CA is named by SSL_CERT_FILE in \
         the daemon's environment)"
    )]
    Tls {
        /// The name.
        host: String,
        /// Why.
        source: io::Error,
    },
    /// The HTTP exchange broke.
    #[error("the HTTP exchange broke: {0}")]
    Http(String),
    /// It answered, but not as hoped.
    #[error("the server answered {status} to {path}: {body}")]
    Status {
        /// What was asked for.
        path: String,
        /// The HTTP status.
        status: StatusCode,
        /// The beginning of its words.
        body: String,
    },
}

impl From<hyper::Error> for Error {
    fn from(error: hyper::Error) -> Self {
        // What really happened is down the chain: "connection error" alone helps nobody.
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(error) = source {
            text = format!("{text}: {error}");
            source = error.source();
        }
        Self::Http(text)
    }
}

/// TLS that trusts the web's CAs and those of the host (`SSL_CERT_FILE` or `SSL_CERT_DIR`, read
/// once in the life of the process: all nodes share it).
pub fn tls_config() -> Arc<ClientConfig> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    CONFIG.get_or_init(|| Arc::new(load_tls_config())).clone()
}

fn load_tls_config() -> ClientConfig {
    let mut roots: RootCertStore = webpki_roots::TLS_SERVER_ROOTS.iter().cloned().collect();
    let native = rustls_native_certs::load_native_certs();
    for error in native.errors {
        warn!(%error, "cannot read some of the host's CA certificates");
    }
    let (_, unusable) = roots.add_parsable_certificates(native.certs);
    if unusable > 0 {
        warn!(
            unusable,
            "some of the host's CA certificates cannot be used"
        );
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    #[expect(
        clippy::expect_used,
        reason = "ring has cipher suites of both TLS versions"
    )]
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring speaks TLS 1.2 and 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth()
}

/// Connects to a host by name or address.
pub async fn tcp(host: &str, port: u16) -> Result<TcpStream, Error> {
    let found = lookup_host((host, port))
        .await
        .map_err(|source| Error::Lookup {
            host: host.into(),
            source,
        })?;
    race(found.collect())
        .await
        .map_err(|source| Error::Connect {
            host: host.into(),
            port,
            source,
        })
}

/// Connects to the address that answers first, the earlier ones having a small lead.
pub async fn race(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut attempts = JoinSet::new();
    for (lead, address) in (0..).zip(alternate(addresses)) {
        attempts.spawn(async move {
            sleep(STAGGER * lead).await;
            let stream = timeout(CONNECT, TcpStream::connect(address))
                .await
                .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no answer"))??;
            stream.set_nodelay(true)?;
            let socket = SockRef::from(&stream);
            let keep_alive = TcpKeepalive::new()
                .with_time(KEEP_ALIVE)
                .with_interval(ASK_AGAIN);
            socket.set_tcp_keepalive(&keep_alive)?;
            socket.set_tcp_user_timeout(Some(GONE))?;
            Ok(stream)
        });
    }
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "it has no address");
    while let Some(attempt) = attempts.join_next().await {
        match attempt.map_err(io::Error::from).flatten() {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// The families by turns, so that a broken one costs one lead and not many.
fn alternate(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (ours, others): (Vec<_>, Vec<_>) = addresses
        .into_iter()
        .partition(|a| a.is_ipv6() == first_is_v6);
    let mut others = others.into_iter();
    let mut order = Vec::new();
    for address in ours {
        order.push(address);
        order.extend(others.next());
    }
    order.extend(others);
    order.truncate(MAX_ADDRESSES);
    order
}

/// Secures a connection to the server of a certificate's name.
pub async fn tls(
    tcp: TcpStream,
    host: &str,
    config: Arc<ClientConfig>,
) -> Result<TlsStream<TcpStream>, Error> {
    let name =
        ServerName::try_from(host.to_owned()).map_err(|_| Error::Name { host: host.into() })?;
    TlsConnector::from(config)
        .connect(name, tcp)
        .await
        .map_err(|source| Error::Tls {
            host: host.into(),
            source,
        })
}

/// An HTTP/1.1 connection. It closes when dropped.
pub struct Http {
    sender: http1::SendRequest<Full<Bytes>>,
    _connection: AbortOnDropHandle<()>,
}

impl Http {
    /// Begins to speak HTTP.
    pub async fn open(stream: Stream) -> Result<Self, Error> {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(async move {
            // Whoever waits for an answer is told of the failure.
            let _ = connection.with_upgrades().await;
        });
        Ok(Self {
            sender,
            _connection: AbortOnDropHandle::new(connection),
        })
    }

    /// Whether the server still takes requests.
    pub async fn is_open(&mut self) -> bool {
        self.sender.ready().await.is_ok()
    }

    /// Sends a request, whatever the answer.
    pub async fn ask(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, Error> {
        Ok(self.sender.send_request(request).await?)
    }

    /// Sends a request; anything but the status hoped for is an error.
    pub async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
        hoped: StatusCode,
    ) -> Result<Response<Incoming>, Error> {
        let path = request.uri().path().to_owned();
        let response = self.ask(request).await?;
        if response.status() == hoped {
            Ok(response)
        } else {
            Err(refusal(path, response).await)
        }
    }

    /// Sends a request to switch protocols, and returns what lies behind.
    pub async fn upgrade(
        mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<TokioIo<Upgraded>, Error> {
        let response = self.send(request, StatusCode::SWITCHING_PROTOCOLS).await?;
        Ok(TokioIo::new(hyper::upgrade::on(response).await?))
    }
}

/// Reads a whole answer of at most `limit` bytes.
pub async fn body(response: Response<Incoming>, limit: usize) -> Result<Bytes, Error> {
    Limited::new(response.into_body(), limit)
        .collect()
        .await
        .map(http_body_util::Collected::to_bytes)
        .map_err(|error| Error::Http(error.to_string()))
}

/// The error that an unwelcome answer makes.
pub async fn refusal(path: String, response: Response<Incoming>) -> Error {
    let status = response.status();
    // A page too long to read or cut short: its status says enough.
    let body = body(response, 64 << 10).await.unwrap_or_default();
    let body = String::from_utf8_lossy(&body)
        .trim()
        .chars()
        .take(MAX_ERROR)
        .collect();
    Error::Status { path, status, body }
}

/// Exponential delays with full jitter, from 0.25 s up to 30 s.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    const SHORTEST: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(30);

    /// How long to wait after one more failure. `random` is from 0 to 1.
    pub fn next(&mut self, random: f64) -> Duration {
        let most = Self::SHORTEST
            .saturating_mul(1 << self.failures.min(16))
            .min(Self::LONGEST);
        self.failures += 1;
        most.mul_f64(random.clamp(0.0, 1.0))
    }

    /// Waits after one more failure.
    pub async fn wait(&mut self) {
        sleep(self.next(rand::random())).await;
    }

    /// All is well again.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn families_take_turns() {
        let parse = |text: &str| text.parse::<SocketAddr>().unwrap();
        let order = alternate(
            [
                "[::1]:1",
                "[::2]:1",
                "127.0.0.1:1",
                "[::3]:1",
                "127.0.0.2:1",
            ]
            .map(parse)
            .into(),
        );
        let wanted = [
            "[::1]:1",
            "127.0.0.1:1",
            "[::2]:1",
            "127.0.0.2:1",
            "[::3]:1",
        ]
        .map(parse);
        assert_eq!(order, wanted);
    }

    #[tokio::test]
    async fn a_dead_address_does_not_hide_a_live_one() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let live = listener.local_addr().unwrap();
        // Bound and not listening: refuses connections for as long as the test runs.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let dead = socket.local_addr().unwrap();
        let stream = race(vec![dead, live]).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), live);
        assert_eq!(
            race(vec![dead]).await.unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
        assert!(race(vec![]).await.is_err());
    }

    proptest! {
        #[test]
        fn delays_grow_within_bounds(failures in 0..1000u32, random in 0.0..1.0f64) {
            let mut backoff = Backoff { failures };
            prop_assert!(backoff.next(random) <= Backoff::LONGEST);
            let before = Backoff { failures }.next(1.0);
            prop_assert!(backoff.next(1.0) >= before);
            backoff.reset();
            prop_assert_eq!(backoff.next(1.0), Backoff::SHORTEST);
        }
    }
}
