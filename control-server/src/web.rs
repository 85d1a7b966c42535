//! The one HTTP listener: the server's key, the way into ts2021 and DERP, and a page for people.

use std::{io, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Path, Query, Request, State as Shared},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{Html, IntoResponse, Json, Response},
    routing::{any, get},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use hyper::server::conn::{http1, http2};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use serde::Deserialize;
use tailnode_wire::{
    derp,
    keys::{ExportableKey, MachineKeyPair},
    noise,
    tailcfg::OverTlsPublicKeyResponse,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{machine, relay::Relay, tailnet::Tailnet};

/// For a request's head and for the Noise handshake.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest request head that is looked at.
const MAX_HEAD: usize = 16 << 10;
/// How a request for DERP begins.
const DERP_REQUEST: &[u8] = b"GET /derp HTTP/1.1\r\n";
/// Captive portal detection: the answer must prove that it is not a portal's.
const CHALLENGE: &str = "x-tailscale-challenge";
const CHALLENGE_ANSWER: &str = "x-tailscale-response";

/// Why a connection ended early.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What all connections share.
pub(crate) struct Site {
    pub tailnet: Arc<Tailnet>,
    pub relay: Relay,
    pub machine: MachineKeyPair,
    pub tasks: TaskTracker,
    pub stop: CancellationToken,
}

impl Site {
    /// Runs a connection until it ends or the server stops.
    fn spawn(&self, connection: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks
            .spawn(async move { stop.run_until_cancelled(connection).await });
    }
}

/// Serves until it is dropped.
pub(crate) async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>, site: Arc<Site>) {
    let router = router(Arc::clone(&site));
    loop {
        match listener.accept().await {
            Ok((connection, peer)) => {
                let (router, tls, shared) = (router.clone(), tls.clone(), Arc::clone(&site));
                site.spawn(async move {
                    if let Err(error) = greet(connection, tls, router, &shared).await {
                        tracing::debug!(%peer, "connection ended: {error}");
                    }
                });
            }
            Err(error) => {
                // Most likely out of file descriptors: others must close theirs first.
                tracing::error!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Secures the connection, where that is how we serve.
async fn greet(
    connection: TcpStream,
    tls: Option<TlsAcceptor>,
    router: Router,
    site: &Site,
) -> Result<(), Failure> {
    connection.set_nodelay(true)?;
    match tls {
        None => {
            let (reader, writer) = connection.into_split();
            converse(reader, writer, router, site).await
        }
        Some(tls) => {
            let connection = timeout(PATIENCE, tls.accept(connection)).await??;
            let (reader, writer) = tokio::io::split(connection);
            converse(reader, writer, router, site).await
        }
    }
}

/// DERP may be wanted without an HTTP answer, which hyper cannot leave out; so the first
/// request's head is looked at before hyper gets it.
async fn converse<R, W>(
    mut reader: R,
    mut writer: W,
    router: Router,
    site: &Site,
) -> Result<(), Failure>
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let mut seen = Vec::new();
    let head_end = timeout(PATIENCE, read_head(&mut reader, &mut seen)).await??;
    if let Some((head, early)) = head_end.and_then(|end| seen.split_at_checked(end))
        && let Some(fast) = derp_upgrade(head)
    {
        if !fast {
            let key = hex(site.relay.public_key().export().as_bytes());
            let answer = format!(
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: {}\r\nConnection: Upgrade\r\n\
                 Derp-Version: {}\r\nDerp-Public-Key: {key}\r\n\r\n",
                derp::UPGRADE,
                derp::VERSION,
            );
            writer.write_all(answer.as_bytes()).await?;
        }
        let reader = io::Cursor::new(early.to_vec()).chain(reader);
        let is_member = |key: &_| site.tailnet.state().has_key(key);
        return Ok(site.relay.serve(reader, writer, is_member).await?);
    }
    let io = tokio::io::join(io::Cursor::new(seen).chain(reader), writer);
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(io), TowerToHyperService::new(router))
        .with_upgrades()
        .await?;
    Ok(())
}

/// Reads until the end of the first request's head and says where that is; `None`: this is not a
/// request for DERP, and hyper is to read on.
async fn read_head(
    connection: &mut (impl AsyncRead + Unpin),
    seen: &mut Vec<u8>,
) -> io::Result<Option<usize>> {
    loop {
        let len = connection.read_buf(seen).await?;
        let known = seen.len().min(DERP_REQUEST.len());
        if len == 0 || seen.len() > MAX_HEAD || seen[..known] != DERP_REQUEST[..known] {
            return Ok(None);
        }
        if let Some(at) = seen.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            return Ok(Some(at + 4));
        }
    }
}

/// Whether the request asks for DERP, and if so, whether without an HTTP answer.
fn derp_upgrade(head: &[u8]) -> Option<bool> {
    let headers = std::str::from_utf8(head.strip_prefix(DERP_REQUEST)?).ok()?;
    let value = |name: &str| {
        let mut headers = headers.lines().filter_map(|line| line.split_once(':'));
        headers
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim())
    };
    let is_derp = value("upgrade")?.eq_ignore_ascii_case(derp::UPGRADE);
    is_derp.then(|| value(derp::FAST_START_HEADER) == Some("1"))
}

fn router(site: Arc<Site>) -> Router {
    Router::new()
        .route("/key", get(key))
        .route("/ts2021", any(ts2021))
        .route("/register/{id}", get(registration))
        .route("/generate_204", get(no_content))
        .route(
            "/derp",
            any(|| async { (StatusCode::UPGRADE_REQUIRED, "ask for an upgrade to DERP\n") }),
        )
        .route("/derp/probe", get(probe))
        .route("/derp/latency-check", get(probe))
        .with_state(site)
}

#[derive(Deserialize)]
struct KeyQuery {
    /// The node's capability version.
    #[serde(rename = "v")]
    _version: u32,
}

/// The answer is the same for all versions, but one that names none wants an older protocol's.
async fn key(Shared(site): Shared<Arc<Site>>, Query(_): Query<KeyQuery>) -> Response {
    Json(OverTlsPublicKeyResponse {
        public_key: site.machine.public,
    })
    .into_response()
}

async fn ts2021(Shared(site): Shared<Arc<Site>>, request: Request) -> Response {
    let header = |name: &str| request.headers().get(name)?.to_str().ok();
    if !header("upgrade").is_some_and(|to| to.eq_ignore_ascii_case(noise::UPGRADE)) {
        return (
            StatusCode::BAD_REQUEST,
            "ask for an upgrade to tailscale-control-protocol\n",
        )
            .into_response();
    }
    let initiation = header(noise::HANDSHAKE_HEADER).and_then(|text| STANDARD.decode(text).ok());
    let Some(initiation) = initiation else {
        return (
            StatusCode::BAD_REQUEST,
            "X-Tailscale-Handshake is missing or not base64\n",
        )
            .into_response();
    };
    let upgraded = hyper::upgrade::on(request);
    let shared = Arc::clone(&site);
    site.spawn(async move {
        let site = shared;
        let shake = async {
            let io = TokioIo::new(upgraded.await.map_err(io::Error::other)?);
            noise::accept(io, &initiation, &site.machine).await
        };
        let accepted = match timeout(PATIENCE, shake).await {
            Ok(Ok(accepted)) => accepted,
            Ok(Err(error)) => return tracing::debug!("no ts2021 channel: {error}"),
            Err(_) => return tracing::debug!("no ts2021 channel: timed out"),
        };
        let router = machine::router(Arc::clone(&site.tailnet), accepted.machine);
        let served = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            // Without it, a node whose host has vanished would stay online for hours.
            .keep_alive_interval(PATIENCE)
            .serve_connection(
                TokioIo::new(accepted.channel),
                TowerToHyperService::new(router),
            );
        if let Err(error) = served.await {
            tracing::debug!(machine = %accepted.machine, "ts2021 channel ended: {error}");
        }
    });
    let headers = [
        (header::UPGRADE, noise::UPGRADE),
        (header::CONNECTION, "upgrade"),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers, Body::empty()).into_response()
}

/// Where a node without auth key sends its user.
async fn registration(Shared(site): Shared<Arc<Site>>, Path(id): Path<String>) -> Response {
    let state = site.tailnet.state();
    let Some(hostname) = state.pending(&id) else {
        let text = "<p>No node waits here: it was approved already, or has to ask again.";
        return (StatusCode::NOT_FOUND, Html(text)).into_response();
    };
    let hostname = escape(hostname);
    Html(format!(
        "<!doctype html><title>Approve a node</title>\n<p>The node <b>{hostname}</b> wants to \
         join. If it is yours, run this where the control server runs:\n\
         <pre>tailnode-control node approve {id}</pre>"
    ))
    .into_response()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

async fn no_content(headers: HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let challenge = headers
        .get(CHALLENGE)
        .and_then(|challenge| challenge.to_str().ok());
    let is_safe = |c: char| c.is_ascii_alphanumeric() || "._-:".contains(c);
    if let Some(challenge) = challenge.filter(|c| c.len() <= 64 && c.chars().all(is_safe))
        && let Ok(answer) = HeaderValue::try_from(format!("response {challenge}"))
    {
        response.headers_mut().insert(CHALLENGE_ANSWER, answer);
    }
    response
}

/// Answers at once, so that nodes without UDP can measure the way here.
async fn probe() -> impl IntoResponse {
    [(header::ACCESS_CONTROL_ALLOW_ORIGIN, "*")]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derp_is_told_from_http() {
        for (head, asks) in [
            (
                "GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\n\r\n",
                Some(false),
            ),
            (
                "GET /derp HTTP/1.1\r\nupgrade: derp\r\nDerp-Fast-Start: 1\r\n\r\n",
                Some(true),
            ),
            ("GET /derp HTTP/1.1\r\nUpgrade: websocket\r\n\r\n", None),
            ("GET /derp HTTP/1.1\r\n\r\n", None),
            ("GET /derp/probe HTTP/1.1\r\nUpgrade: DERP\r\n\r\n", None),
            ("POST /ts2021 HTTP/1.1\r\nUpgrade: DERP\r\n\r\n", None),
        ] {
            assert_eq!(derp_upgrade(head.as_bytes()), asks, "{head}");
        }
    }

    #[test]
    fn a_host_name_cannot_carry_markup() {
        assert_eq!(escape("<script>&"), "&lt;script&gt;&amp;");
    }
}
