//! What a node asks through the Noise channel: `/machine/register` and `/machine/map`.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State as Shared,
    http::{StatusCode, header},
    response::{IntoResponse, Json, Response},
    routing::post,
};
use chrono::Utc;
use futures_util::stream;
use serde::de::DeserializeOwned;
use tailnode_wire::{
    keys::MachinePublicKey,
    tailcfg::{MapRequest, MapResponse, NodeId, RegisterRequest},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::{
    Error,
    netmap::View,
    tailnet::{Registration, StreamId, Tailnet},
};

/// A node with many addresses and services has a few KiB.
const MAX_BODY: usize = 256 << 10;
/// Nodes give a stream up after 120 s of silence; Tailscale's own servers send about so often.
const KEEP_ALIVE: Duration = Duration::from_secs(50);
/// So that not all nodes are served at the same moment.
const JITTER: Duration = Duration::from_secs(10);
/// An ephemeral node may come back that soon after its stream broke.
const EPHEMERAL_GRACE: Duration = Duration::from_secs(5);
/// A node that has just registered, or knows not yet that the server was restarted, has longer.
const ARRIVAL_GRACE: Duration = Duration::from_secs(60);
/// zstd's fastest ordinary level; map responses are small.
const COMPRESSION: i32 = 1;

#[derive(Clone)]
struct Caller {
    tailnet: Arc<Tailnet>,
    machine: MachinePublicKey,
}

/// The service for one Noise channel, whose other end is `machine`.
pub(crate) fn router(tailnet: Arc<Tailnet>, machine: MachinePublicKey) -> Router {
    Router::new()
        .route("/machine/register", post(register))
        .route("/machine/map", post(map))
        .fallback(|| async {
            (
                StatusCode::NOT_IMPLEMENTED,
                "not offered by this control server",
            )
        })
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY))
        .with_state(Caller { tailnet, machine })
}

/// Any state the request finds is an answer; only the server's own failures are not.
impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let status = match self {
            Self::NoNode { .. } => StatusCode::NOT_FOUND,
            Self::Request(_) => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        tracing::warn!("{self}");
        (status, self.to_string()).into_response()
    }
}

/// Go's encoder names no content type, so axum's extractor would refuse it.
fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(Error::Request)
}

async fn register(Shared(caller): Shared<Caller>, body: Bytes) -> Result<Response, Error> {
    let request: RegisterRequest = parse(&body)?;
    let mut changes = caller.tailnet.changes();
    loop {
        changes.mark_unchanged();
        // Looking again changes nothing, so only an answer wakes the others.
        let registration =
            caller
                .tailnet
                .state()
                .register(&caller.machine, &request, Utc::now())?;
        if let Registration::Done(answer) = registration {
            caller.tailnet.changed();
            return Ok(Json(answer).into_response());
        }
        if changes.changed().await.is_err() {
            return Ok(StatusCode::SERVICE_UNAVAILABLE.into_response());
        }
    }
}

async fn map(Shared(caller): Shared<Caller>, body: Bytes) -> Result<Response, Error> {
    let request: MapRequest = parse(&body)?;
    let tailnet = caller.tailnet;
    let Some(id) = tailnet.state().caller(&caller.machine, &request.node_key) else {
        return Ok((StatusCode::NOT_FOUND, "this node is not registered").into_response());
    };
    let told = tailnet.state().update(id, &request)?;
    if told {
        tailnet.changed();
    }
    let zstd = request.compress == "zstd";
    if request.stream {
        let changes = tailnet.changes();
        let stream = tailnet.state().connect(id, Utc::now())?;
        tailnet.changed();
        let session = Session {
            presence: Presence {
                tailnet,
                id,
                stream,
            },
            changes,
            told: None,
            zstd,
        };
        return Ok(map_response(Body::from_stream(stream::unfold(
            session, next,
        ))));
    }
    if request.omit_peers {
        return Ok(StatusCode::OK.into_response());
    }
    let view = View::of(&mut tailnet.state(), id)?;
    Ok(map_response(Body::from(frame(
        &view.full(Utc::now()),
        zstd,
    )?)))
}

fn map_response(body: Body) -> Response {
    ([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response()
}

/// A map stream.
struct Session {
    presence: Presence,
    changes: watch::Receiver<()>,
    /// The view that the node has by now.
    told: Option<View>,
    zstd: bool,
}

/// The node is online as long as this lives.
struct Presence {
    tailnet: Arc<Tailnet>,
    id: NodeId,
    stream: StreamId,
}

async fn next(mut session: Session) -> Option<(Result<Bytes, Infallible>, Session)> {
    let message = session.message().await?;
    let framed = frame(&message, session.zstd);
    let framed = framed
        .inspect_err(|error| tracing::error!("map stream ends: {error}"))
        .ok()?;
    Some((Ok(framed), session))
}

impl Session {
    /// The next message for the node; `None`: there will be no more.
    async fn message(&mut self) -> Option<MapResponse> {
        let keep_alive = Instant::now() + KEEP_ALIVE + JITTER.mul_f64(rand::random());
        loop {
            self.changes.mark_unchanged();
            let Presence {
                tailnet,
                id,
                stream,
            } = &self.presence;
            let view = {
                let mut state = tailnet.state();
                if !state.is_current(*id, *stream) {
                    return None;
                }
                View::of(&mut state, *id)
            };
            let view = view
                .inspect_err(|error| tracing::error!("map stream ends: {error}"))
                .ok()?;
            let message = match &self.told {
                None => Some(view.full(Utc::now())),
                Some(told) => told.delta(&view),
            };
            if let Some(message) = message {
                self.told = Some(view);
                return Some(message);
            }
            tokio::select! {
                changed = self.changes.changed() => changed.ok()?,
                () = sleep_until(keep_alive) => {
                    return Some(MapResponse { keep_alive: true, ..MapResponse::default() });
                }
            }
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        let ended = self
            .tailnet
            .state()
            .disconnect(self.id, self.stream, Utc::now());
        match ended {
            Ok(true) => self.tailnet.changed(),
            Ok(false) => {}
            Err(error) => tracing::error!("node {} has left: {error}", self.id),
        }
    }
}

/// Removes ephemeral nodes some time after they have left, until it is dropped.
pub(crate) async fn reap(tailnet: Arc<Tailnet>) {
    let mut changes = tailnet.changes();
    let mut due: BTreeMap<NodeId, Instant> = BTreeMap::new();
    loop {
        changes.mark_unchanged();
        let absent = tailnet.state().absent();
        let now = Instant::now();
        due.retain(|id, _| absent.contains_key(id));
        for (id, was_here) in absent {
            let grace = if was_here {
                EPHEMERAL_GRACE
            } else {
                ARRIVAL_GRACE
            };
            due.entry(id).or_insert(now + grace);
        }
        for (id, _) in due.extract_if(.., |_, at| *at <= now) {
            if let Err(error) = tailnet.change(|state| state.remove(id)) {
                tracing::error!("ephemeral node {id} cannot be removed: {error}");
            }
        }
        let next = due.values().min().copied();
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = sleep_until(next.unwrap_or(now)), if next.is_some() => {}
        }
    }
}

/// Length (little-endian, 4 bytes) and JSON, compressed if the node wants it.
fn frame(message: &MapResponse, zstd: bool) -> Result<Bytes, Error> {
    let mut json = serde_json::to_vec(message).map_err(Error::Request)?;
    if zstd {
        json = zstd::bulk::compress(&json, COMPRESSION).map_err(Error::Serve)?;
    }
    let len = u32::try_from(json.len()).unwrap_or(u32::MAX);
    Ok([&len.to_le_bytes()[..], &json].concat().into())
}
