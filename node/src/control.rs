//! The session with the control server: joining, the map stream, and telling where we are.
//!
//! One task per node. It connects (`/key`, then ts2021, then HTTP/2 inside), registers, follows
//! the map stream, and begins again when any of that breaks. Decisions live in [`registration`]
//! and [`frames`], which do no IO.
//!
//! What is ignored by design: dial plans (the login server's own name is enough), SSH policies,
//! and commands to exit or to probe peers.

use std::{convert::Infallible, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use chrono::{DateTime, Utc};
use futures_util::FutureExt;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::{
    body::{Frame, Incoming},
    client::conn::http2,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use ipnet::IpNet;
use serde::{Serialize, de::DeserializeOwned};
use tailnode_wire::{
    CAPABILITY_VERSION, noise,
    tailcfg::{
        EndpointType, Hostinfo, MapRequest, MapResponse, NetInfo, OverTlsPublicKeyResponse,
        PingRequest, RegisterRequest, RegisterResponse,
    },
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::{codec::Decoder, either::Either, task::AbortOnDropHandle};
use tracing::{Instrument, debug, info, warn};
use url::Url;

mod frames;
mod lock;
mod oauth;
mod pace;
mod registration;

use frames::Frames;
use oauth::NoKey;
use pace::{Pace, Socket};
use registration::{Key, Registration, Standing, Step};

use crate::{
    auth_key::{AuthKey, Secret},
    clock::Clock,
    dial::{self, Backoff, Http},
    netmap::{Lock, expiry, is_expired},
    state::Keys,
    status::Login,
};

/// How long a new connection may take, from DNS to HTTP/2.
const CONNECT: Duration = Duration::from_secs(20);
/// How long an answer may take that no person must give.
const ANSWER: Duration = Duration::from_secs(30);
/// The map stream is dead after this silence (controlclient/direct.go, watchdogTimeout).
const WATCHDOG: Duration = Duration::from_secs(120);
/// HTTP/2 pings while an answer is awaited, so that a dead connection shows before the watchdog.
const H2_PING: Duration = Duration::from_secs(45);
/// How long such a ping may take.
const H2_PONG: Duration = Duration::from_secs(20);
/// A map stream that lived so long was a good one: the next may begin soon.
const SETTLED: Duration = Duration::from_secs(10);
/// Whom a server forgets that was heard of so lately has been deleted; who was away for longer may
/// be an ephemeral node that the server swept out.
const LATELY: Duration = Duration::from_secs(90);
/// The longest sleep that the server may order (controlclient/direct.go, sleepAsRequested).
const MAX_SLEEP: Duration = Duration::from_secs(300);
/// Pings of the server answered at a time.
const MAX_PINGS: usize = 4;
/// How long the answer to a ping may take (controlclient/direct.go, answerHeadPing).
const PING: Duration = Duration::from_secs(15);
const MAP: &str = "/machine/map";
/// Largest answer that is not a map.
const MAX_ANSWER: usize = 1 << 20;
/// Largest answer that tells of tailnet lock: 2000 updates with all that they may say.
const MAX_LOCK: usize = 16 << 20;

/// Whom to join as what.
#[derive(Debug)]
pub struct Config {
    /// The control server, `http` or `https`.
    pub login_server: Url,
    /// A key to join with; without one, a person must log in.
    pub auth_key: Option<AuthKey>,
    /// The name to ask for.
    pub hostname: String,
    /// Tags to ask for, `tag:` included.
    pub tags: Vec<String>,
    /// Subnets to offer.
    pub routes: Vec<IpNet>,
    /// Ask to be forgotten when gone.
    pub ephemeral: bool,
    /// It joined before, by all that is kept of it.
    pub known: bool,
    /// Whom tailnet lock trusts, by what is kept.
    pub lock: Lock,
    /// Whom to trust: [`dial::tls_config`].
    pub tls: Arc<rustls::ClientConfig>,
}

/// What the control server should know of our network.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Advertised {
    /// Where peers may reach us by UDP.
    pub endpoints: Vec<(SocketAddr, EndpointType)>,
    /// What we learned of our network, the home relay included.
    pub net_info: NetInfo,
}

/// What the session has to tell.
#[derive(Debug)]
pub enum Event {
    /// How we stand with the control server; sent when it changes.
    Login(Login),
    /// What is known of tailnet lock; all maps that follow are to be judged by it.
    Lock(Lock),
    /// A message of the map stream.
    Map {
        /// The message.
        response: Box<MapResponse>,
        /// It begins a stream: forget what it does not mention.
        first: bool,
    },
    /// Our keys changed: keep them, and say so, for the control server is not asked before.
    Keys {
        /// All of them.
        keys: Keys,
        /// Where to say it.
        kept: oneshot::Sender<()>,
    },
}

/// A running session. It ends when this is dropped.
#[derive(Debug)]
pub struct Handle {
    advertised: watch::Sender<Advertised>,
    moved: watch::Sender<()>,
    /// Carries who waits for the logout.
    logout: oneshot::Sender<oneshot::Sender<Result<(), String>>>,
    task: AbortOnDropHandle<()>,
}

impl Handle {
    /// Tells the control server where we are, now and after every reconnect; several calls in a
    /// row cost one request.
    pub fn advertise(&self, advertised: Advertised) {
        self.advertised.send_if_modified(|old| {
            let changed = *old != advertised;
            *old = advertised;
            changed
        });
    }

    /// The host's way to the Internet changed: connects anew, since nothing would tell for a minute
    /// that the connection leads nowhere.
    pub fn moved(&self) {
        self.moved.send_replace(());
    }

    /// Ends the session and tells the control server to forget us.
    ///
    /// # Errors
    /// If it could not be told in time, in words for a person.
    pub async fn logout(self, within: Duration) -> Result<(), String> {
        let Self {
            advertised: _open,
            moved: _,
            logout,
            task,
        } = self;
        let (done, finished) = oneshot::channel();
        let told = if logout.send(done).is_err() {
            Err("the session had ended before".to_owned())
        } else {
            match timeout(within, finished).await {
                Ok(Ok(told)) => told,
                Ok(Err(_)) => Err("the session ended before".to_owned()),
                Err(_) => Err(format!("no answer in {} s", within.as_secs())),
            }
        };
        task.abort();
        told.inspect_err(|error| {
            warn!(
                error,
                "the control server was not told of the logout: the node stays listed there"
            );
        })
    }
}

/// Tells the control server to forget a node that does not run.
///
/// # Errors
/// If it could not be told in time, in words for a person.
pub async fn logout(config: &Config, keys: &Keys, within: Duration) -> Result<(), String> {
    let tell = async {
        let connection = Connection::open(config, keys).await?;
        connection.logout(config, keys).await
    };
    match timeout(within, tell).await {
        Ok(told) => told.map_err(Failure::into_words),
        Err(_) => Err(format!("no answer in {} s", within.as_secs())),
    }
}

/// Starts a session. It ends with its handle, or when nobody takes its events.
pub fn spawn(config: Config, keys: Keys, events: mpsc::Sender<Event>) -> Handle {
    let (advertised_tx, advertised) = watch::channel(Advertised::default());
    let (moved_tx, moved) = watch::channel(());
    let (logout_tx, logout) = oneshot::channel::<oneshot::Sender<Result<(), String>>>();
    let hostinfo = hostinfo(&config);
    let span = tracing::info_span!("control", hostname = config.hostname);
    let standing = if config.known {
        Standing::Member
    } else {
        Standing::Stranger
    };
    let mut session = Session {
        lock: config.lock.clone(),
        config,
        hostinfo,
        keys,
        events,
        advertised,
        moved,
        connection: None,
        login: Login::Starting,
        mapped: Login::Running,
        clock: Clock::of_host(),
        lock_head: None,
        lock_asked: None,
        heard: None,
        registration: None,
        minted: None,
        registered: false,
        standing,
        resume: None,
        last_ping: String::new(),
    };
    let task = tokio::spawn(
        async move {
            let mut logout = pin!(logout);
            let asked = tokio::select! {
                biased;
                asked = &mut logout => asked,
                () = session.run() => logout.await,
            };
            // An error says that the handle is gone, and with it the wish to log out.
            if let Ok(done) = asked {
                let told = session.logout().await;
                if told.is_ok() {
                    info!("no longer a member");
                }
                // Whoever asked may have stopped waiting.
                let _ = done.send(told.map_err(Failure::into_words));
            }
        }
        .instrument(span),
    );
    Handle {
        advertised: advertised_tx,
        moved: moved_tx,
        logout: logout_tx,
        task: AbortOnDropHandle::new(task),
    }
}

/// Why a session cannot go on as it is.
#[derive(Debug)]
enum Failure {
    /// Try again.
    Retry {
        error: String,
        /// Not sooner than the server asked for.
        after: Option<Duration>,
    },
    /// The server's no.
    Refused(String),
    /// The server does not know us (any more), or not by this key.
    Unknown(String),
    /// The node key has expired.
    Expired,
    /// Nobody takes our events.
    Unheard,
}

impl Failure {
    fn into_words(self) -> String {
        match self {
            Self::Retry { error, .. } | Self::Refused(error) | Self::Unknown(error) => error,
            Self::Expired => "the node's key has expired".to_owned(),
            Self::Unheard => "the node has stopped".to_owned(),
        }
    }
}

impl From<dial::Error> for Failure {
    fn from(error: dial::Error) -> Self {
        retry(error)
    }
}

impl From<hyper::Error> for Failure {
    fn from(error: hyper::Error) -> Self {
        retry(dial::Error::from(error))
    }
}

fn retry(error: impl ToString) -> Failure {
    Failure::Retry {
        error: error.to_string(),
        after: None,
    }
}

struct Session {
    config: Config,
    hostinfo: Hostinfo,
    keys: Keys,
    events: mpsc::Sender<Event>,
    advertised: watch::Receiver<Advertised>,
    moved: watch::Receiver<()>,
    connection: Option<Connection>,
    /// What was last reported.
    login: Login,
    /// How the last map that spoke of us saw us.
    mapped: Login,
    clock: Clock,
    lock: Lock,
    /// The last update of tailnet lock by the server's word; `None`: it is off.
    lock_head: Option<String>,
    /// When it was last tried to learn of that.
    lock_asked: Option<Instant>,
    /// When the last message of a map stream came.
    heard: Option<Instant>,
    /// An attempt to join that a lost connection does not end.
    registration: Option<Registration>,
    /// The auth key that an OAuth client made for it.
    minted: Option<Secret>,
    registered: bool,
    /// What we are to the server while we are not registered.
    standing: Standing,
    resume: Option<Resume>,
    /// The URL of the last ping answered: servers repeat pings in every message.
    last_ping: String,
}

/// A map session that the server may let us rejoin.
struct Resume {
    handle: String,
    seq: i64,
}

impl Session {
    /// Stays in the tailnet; returns when there is no sense in trying again.
    async fn run(&mut self) {
        let mut backoff = Backoff::default();
        loop {
            let mut live = None;
            let Err(failure) = self.attempt(&mut live).await;
            self.connection = None;
            if live.is_some_and(|since: Instant| since.elapsed() >= SETTLED) {
                backoff.reset();
            }
            let (report, after) = match failure {
                // A stream that ends is begun again; only if that fails is the server away.
                Failure::Retry { error, after } if live.is_some() => {
                    debug!(error, "the map stream ended");
                    (None, after)
                }
                Failure::Retry { error, after } => {
                    let error = format!("{}: {error}", self.config.login_server);
                    (Some(Login::Offline { error }), after)
                }
                Failure::Refused(words) => {
                    let error = format!(
                        "{words} (correct the auth key, the tags or the name, and start the node \
                         again)"
                    );
                    let refused = Login::Refused { error };
                    if self.report(refused).await.is_err() {
                        debug!("nobody takes the refusal");
                    }
                    return;
                }
                Failure::Unknown(error) => {
                    self.registered = false;
                    self.resume = None;
                    let here = self.heard.is_some_and(|at| at.elapsed() < LATELY);
                    if here && !self.config.ephemeral {
                        self.standing = Standing::Forgotten;
                    }
                    let error = format!("{}: {error}", self.config.login_server);
                    (live.is_none().then_some(Login::Offline { error }), None)
                }
                Failure::Expired => {
                    self.registered = false;
                    self.standing = Standing::Expired;
                    (Some(Login::Expired), None)
                }
                Failure::Unheard => return,
            };
            if let Some(report) = report
                && self.report(report).await.is_err()
            {
                return;
            }
            match after {
                Some(after) => sleep(after).await,
                None => backoff.wait().await,
            }
        }
    }

    /// Connects, joins and follows the map. `live` is set when the map stands.
    async fn attempt(&mut self, live: &mut Option<Instant>) -> Result<Infallible, Failure> {
        self.moved.mark_unchanged();
        let connection = Connection::open(&self.config, &self.keys).await?;
        self.connection = Some(connection.clone());
        if !self.registered {
            self.register(&connection).await?;
        }
        self.follow(&connection, live).await
    }

    async fn register(&mut self, connection: &Connection) -> Result<(), Failure> {
        let mut pace = Backoff::default();
        let mut registration = self.registration.take().unwrap_or_else(|| {
            let key = match self.config.auth_key {
                None => Key::None,
                Some(AuthKey::Key(_)) => Key::AtHand,
                Some(AuthKey::Client(_)) => Key::OnDemand,
            };
            Registration::new(&self.keys, key, self.standing)
        });
        if let Some(url) = registration.visit() {
            let (url, reason) = (url.to_owned(), registration.reason_to_visit());
            self.report(Login::NeedsLogin { url, reason }).await?;
        }
        loop {
            self.keep(|keys| keys.next = registration.next().cloned())
                .await?;
            let key = match self.key_for(&registration).await {
                Ok(key) => key,
                Err(NoKey::Refused(words)) => {
                    registration.key_refused(words);
                    continue;
                }
                Err(NoKey::Away(failure)) => {
                    self.registration = Some(registration);
                    return Err(failure);
                }
            };
            let request =
                registration.request(key.as_ref(), self.hostinfo.clone(), self.config.ephemeral);
            let answer = if registration.visit().is_some() {
                connection.register(&request).await
            } else {
                timeout(ANSWER, connection.register(&request))
                    .await
                    .unwrap_or_else(|_| {
                        Err(retry(format!(
                            "no answer to the registration in {} s",
                            ANSWER.as_secs()
                        )))
                    })
            };
            let mut answer = match answer {
                Ok(answer) => answer,
                Err(failure) => {
                    // The page may be visited while we are away, and then names these keys.
                    self.registration = Some(registration);
                    return Err(failure);
                }
            };
            if let Some(key) = &key {
                answer.error = key.hidden_in(&answer.error);
            }
            // Good for one answer.
            self.minted = None;
            match registration.answer(answer) {
                Step::Again => {}
                Step::Lapsed => pace.wait().await,
                Step::Visit(url) => {
                    let reason = registration.reason_to_visit();
                    let login = Login::NeedsLogin { url, reason };
                    if self.login == login {
                        // Not all servers wait for the person before they answer.
                        pace.wait().await;
                    }
                    self.report(login).await?;
                }
                Step::Refused(words) => {
                    let reason = Some(registration.reason()).filter(|reason| !reason.is_empty());
                    let words = reason.map_or(words.clone(), |reason| format!("{reason}: {words}"));
                    return Err(Failure::Refused(words));
                }
                Step::Expired => return Err(Failure::Expired),
                Step::Joined { node, rotated } => {
                    self.registered = true;
                    self.standing = Standing::Member;
                    if rotated {
                        self.resume = None;
                    }
                    let keep = |keys: &mut Keys| {
                        keys.node = node;
                        keys.next = None;
                        keys.replaces = None;
                    };
                    return self.keep(keep).await;
                }
            }
        }
    }

    /// The key that this attempt is to present, which an OAuth client may have to make first.
    async fn key_for(&mut self, registration: &Registration) -> Result<Option<Secret>, NoKey> {
        match &self.config.auth_key {
            Some(AuthKey::Key(key)) => Ok(Some(key.clone())),
            Some(AuthKey::Client(client)) if registration.presents_key() => {
                if self.minted.is_none() {
                    let Config {
                        tags,
                        ephemeral,
                        tls,
                        ..
                    } = &self.config;
                    self.minted = Some(oauth::mint(client, tags, *ephemeral, tls).await?);
                    info!("the OAuth client made an auth key for this node");
                }
                Ok(self.minted.clone())
            }
            _ => Ok(None),
        }
    }

    async fn follow(
        &mut self,
        connection: &Connection,
        live: &mut Option<Instant>,
    ) -> Result<Infallible, Failure> {
        let silence = || retry(format!("nothing heard for {} s", WATCHDOG.as_secs()));
        let mut updates = Updates {
            connection: connection.clone(),
            advertised: self.advertised.clone(),
            template: self.map_request(),
        };
        let request = MapRequest {
            compress: "zstd".into(),
            keep_alive: true,
            stream: true,
            omit_peers: false,
            map_session_handle: self
                .resume
                .as_ref()
                .map(|r| r.handle.clone())
                .unwrap_or_default(),
            map_session_seq: self.resume.as_ref().map_or(0, |r| r.seq),
            ..updates.request()
        };
        let response = timeout(WATCHDOG, connection.post(MAP, &request))
            .await
            .map_err(|_| silence())??;
        let status = response.status();
        if status != StatusCode::OK {
            return Err(unwelcome(MAP, response).await);
        }

        let mut body = response.into_body();
        let mut buffer = BytesMut::new();
        let mut updates = pin!(updates.run());
        let mut pings = JoinSet::new();
        let mut expires = None;
        let mut pace = Pace::new(Instant::now());
        loop {
            while let Some(packed) = Frames.decode(&mut buffer).map_err(retry)? {
                pace.note(Instant::now());
                let message = packed.read().await.map_err(retry)?;
                if let Some(ping) = &message.ping_request {
                    self.ping(ping, connection, &mut pings);
                }
                if let Some(node) = &message.node {
                    expires = expiry(node);
                }
                self.take(message, live).await?;
            }
            // What is there already does not wait.
            if let Some(frame) = body.frame().now_or_never() {
                take_frame(frame, &mut buffer)?;
                continue;
            }
            let gather = pace.gather(Instant::now());
            let hush = |_| connection.socket.hush().map_err(retry);
            let _hushed = gather.map(hush).transpose()?;
            tokio::select! {
                frame = timeout(WATCHDOG, body.frame()) => {
                    take_frame(frame.map_err(|_| silence())?, &mut buffer)?;
                }
                failure = &mut updates => return Err(failure),
                Ok(()) = self.moved.changed() => return Err(retry("the host has moved")),
                Some(ping) = pings.join_next() => if let Err(error) = ping {
                    debug!(%error, "answering a ping failed");
                },
                () = moment(self.clock, expires) => return Err(Failure::Expired),
                () = sleep_until(gather.unwrap_or_else(Instant::now)), if gather.is_some() => {}
            }
        }
    }

    /// Takes one message of the map stream.
    async fn take(
        &mut self,
        message: MapResponse,
        live: &mut Option<Instant>,
    ) -> Result<(), Failure> {
        self.heard = Some(Instant::now());
        if let Some(debug) = &message.debug {
            self.obey(debug).await;
        }
        if !message.pop_browser_url.is_empty() {
            info!(
                url = message.pop_browser_url,
                "the control server wants this page to be opened"
            );
        }
        if message.keep_alive {
            // What could not be learned may be now.
            return self.heed_lock(&message, false).await;
        }
        let mut first = false;
        if live.is_none() {
            // The server lets us rejoin a session by naming it again.
            let rejoined = self
                .resume
                .as_ref()
                .is_some_and(|resume| resume.handle == message.map_session_handle);
            if !rejoined {
                if message.node.is_none() {
                    return Err(retry("the first map does not tell who we are"));
                }
                first = true;
                self.resume = Some(message.map_session_handle.clone())
                    .filter(|handle| !handle.is_empty())
                    .map(|handle| Resume { handle, seq: 0 });
            }
            *live = Some(Instant::now());
        }
        if let Some(resume) = &mut self.resume
            && message.seq != 0
        {
            resume.seq = message.seq;
        }
        if let Some(now) = message.control_time {
            self.clock.set(now);
        }
        if let Some(node) = &message.node {
            self.mapped = if is_expired(node, self.clock.now()) {
                Login::Expired
            } else if !node.machine_authorized {
                Login::NeedsApproval
            } else {
                Login::Running
            };
        }
        if self.mapped == Login::NeedsApproval {
            // Before the map, which looks like that of any member to those who wait for one.
            self.report(Login::NeedsApproval).await?;
        }
        self.heed_lock(&message, first).await?;
        let event = Event::Map {
            response: Box::new(message),
            first,
        };
        self.tell(event).await?;
        match self.mapped.clone() {
            Login::Expired => Err(Failure::Expired),
            mapped => self.report(mapped).await,
        }
    }

    /// Learns whom tailnet lock trusts, where that is not what the server says it should be.
    async fn heed_lock(&mut self, message: &MapResponse, first: bool) -> Result<(), Failure> {
        // Nothing said is nothing changed, except where a stream begins.
        if first || message.tka_info.is_some() {
            let info = message.tka_info.as_ref().filter(|info| !info.disabled);
            self.lock_head = info.map(|info| info.head.clone());
            self.lock_asked = None;
        }
        let head = self.lock_head.as_deref();
        let Some(connection) = &self.connection else {
            return Ok(());
        };
        if self.lock_asked.is_some_and(|at| at.elapsed() < ANSWER) {
            return Ok(());
        }
        let known = match &self.lock {
            Lock::On(authority) => Some(authority),
            Lock::Off | Lock::Unread { .. } => None,
        };
        let lock = match (known, head) {
            (None, None) => Lock::Off,
            (Some(authority), Some(head)) if authority.head().to_string() == head => return Ok(()),
            (known, head) => {
                self.lock_asked = Some(Instant::now());
                let learned = lock::learn(connection, &self.keys.node.public, known, head);
                let learned = timeout(ANSWER, learned).await;
                match (learned.unwrap_or_else(|_| Err(retry("no answer"))), known) {
                    (Ok(lock), _) => lock,
                    (Err(failure), known) => {
                        let error = failure.into_words();
                        warn!(error, "cannot learn whom tailnet lock trusts");
                        match known {
                            Some(authority) => Lock::On(authority.clone()),
                            None => Lock::Unread { error },
                        }
                    }
                }
            }
        };
        if lock == self.lock {
            return Ok(());
        }
        info!(on = lock != Lock::Off, "tailnet lock");
        self.lock = lock.clone();
        self.tell(Event::Lock(lock)).await
    }

    async fn obey(&self, debug: &tailnode_wire::tailcfg::Debug) {
        if debug.sleep_seconds > 0.0 {
            let asked = Duration::try_from_secs_f64(debug.sleep_seconds).unwrap_or(MAX_SLEEP);
            info!(?asked, "the control server orders a pause");
            sleep(asked.min(MAX_SLEEP)).await;
        }
        if let Some(code) = debug.exit {
            // One tailnet's server does not end the daemon of them all.
            warn!(code, "the control server's order to exit is ignored");
        }
    }

    /// Answers a ping in the background.
    fn ping(&mut self, ping: &PingRequest, connection: &Connection, pings: &mut JoinSet<()>) {
        if ping.url.is_empty() || ping.url == self.last_ping || pings.len() >= MAX_PINGS {
            return;
        }
        self.last_ping.clone_from(&ping.url);
        let Ok(url) = ping.url.parse::<Url>() else {
            debug!(
                url = ping.url,
                "a ping of the control server has no valid URL"
            );
            return;
        };
        let answer = match &*ping.types {
            "" if ping.url_is_noise => Either::Left(connection.clone().ping(url, Method::HEAD, "")),
            "c2n" => Either::Left(connection.clone().ping(url, Method::POST, NOT_SUPPORTED)),
            // Only there: a foreign tailnet's server has no business with what else this host
            // can reach.
            "" if url.host() == self.config.login_server.host() => {
                Either::Right(head(url, self.config.tls.clone()))
            }
            types => {
                info!(
                    types,
                    "the control server asks for a kind of ping that this node does not answer"
                );
                return;
            }
        };
        let log = ping.log;
        pings.spawn(async move {
            match timeout(PING, answer).await {
                Ok(Ok(())) if log => info!("answered the control server's ping"),
                Ok(Ok(())) => {}
                Ok(Err(failure)) => debug!(?failure, "cannot answer the control server's ping"),
                Err(_) => debug!("the answer to the control server's ping took too long"),
            }
        });
    }

    /// Ends the node's membership.
    async fn logout(&mut self) -> Result<(), Failure> {
        // A server that never let us in has nobody to forget, and would take us for a newcomer.
        if matches!(self.login, Login::Refused { .. } | Login::NeedsLogin { .. }) {
            return Ok(());
        }
        let connection = match self.connection.take() {
            Some(connection) if connection.is_open() => connection,
            _ => Connection::open(&self.config, &self.keys).await?,
        };
        connection.logout(&self.config, &self.keys).await
    }

    /// What all map requests have in common.
    fn map_request(&self) -> MapRequest {
        MapRequest {
            version: CAPABILITY_VERSION,
            compress: String::new(),
            keep_alive: false,
            node_key: self.keys.node.public,
            disco_key: self.keys.disco.public,
            stream: false,
            hostinfo: Some(self.hostinfo.clone()),
            map_session_handle: String::new(),
            map_session_seq: 0,
            endpoints: Vec::new(),
            endpoint_types: Vec::new(),
            omit_peers: true,
            read_only: false,
        }
    }

    /// Changes our keys, and returns when they are on disk.
    async fn keep(&mut self, change: impl FnOnce(&mut Keys)) -> Result<(), Failure> {
        let before = self.keys.clone();
        change(&mut self.keys);
        if self.keys == before {
            return Ok(());
        }
        let (kept, done) = oneshot::channel();
        let keys = self.keys.clone();
        self.tell(Event::Keys { keys, kept }).await?;
        done.await.map_err(|_| Failure::Unheard)
    }

    async fn report(&mut self, mut login: Login) -> Result<(), Failure> {
        let keys = self.config.auth_key.iter().map(AuthKey::secret);
        for key in keys.chain(&self.minted) {
            hide(key, &mut login);
        }
        if self.login == login {
            return Ok(());
        }
        self.login = login.clone();
        self.tell(Event::Login(login)).await
    }

    async fn tell(&self, event: Event) -> Result<(), Failure> {
        self.events.send(event).await.map_err(|_| Failure::Unheard)
    }
}

/// Takes a secret out of a server's words, which may repeat what it was told and go to logs and
/// terminals.
fn hide(secret: &Secret, login: &mut Login) {
    match login {
        Login::NeedsLogin { reason: words, .. }
        | Login::Offline { error: words }
        | Login::Refused { error: words } => *words = secret.hidden_in(words),
        Login::Starting
        | Login::NeedsApproval
        | Login::Running
        | Login::Expired
        | Login::Stopped => {}
    }
}

/// Keeps the control server told of where we are, for the life of one map stream.
///
/// Servers may ignore what the stream's own request says (tailcfg.go, capability version 68), so
/// it is said again beside it.
struct Updates {
    connection: Connection,
    advertised: watch::Receiver<Advertised>,
    template: MapRequest,
}

impl Updates {
    fn request(&mut self) -> MapRequest {
        let Advertised {
            endpoints,
            net_info,
        } = self.advertised.borrow_and_update().clone();
        let mut request = self.template.clone();
        if let Some(hostinfo) = &mut request.hostinfo {
            hostinfo.net_info = Some(net_info);
        }
        (request.endpoints, request.endpoint_types) = endpoints.into_iter().unzip();
        request
    }

    /// Returns when the server does not know us. Not all end the stream of a node that was deleted.
    async fn run(mut self) -> Failure {
        let mut backoff = Backoff::default();
        loop {
            let request = self.request();
            let sent = timeout(ANSWER, self.connection.update(&request));
            match sent.await.unwrap_or_else(|_| Err(retry("no answer"))) {
                Ok(()) => {
                    backoff.reset();
                    if self.advertised.changed().await.is_err() {
                        // The handle is gone; the session ends with it.
                        std::future::pending::<()>().await;
                    }
                }
                Err(failure @ Failure::Unknown(_)) => return failure,
                Err(failure) => {
                    warn!(?failure, "cannot tell the control server our endpoints");
                    backoff.wait().await;
                }
            }
        }
    }
}

/// HTTP/2 inside ts2021. It closes when the last clone is dropped.
#[derive(Clone)]
struct Connection {
    sender: http2::SendRequest<Full<Bytes>>,
    /// `https://` and the server's name, as HTTP/2 wants it in every request.
    origin: String,
    base: String,
    /// What all this is carried by.
    socket: Arc<Socket>,
    _driver: Arc<AbortOnDropHandle<()>>,
}

impl Connection {
    async fn open(config: &Config, keys: &Keys) -> Result<Self, Failure> {
        timeout(CONNECT, Self::open_slowly(config, keys))
            .await
            .unwrap_or_else(|_| Err(retry(format!("no connection in {} s", CONNECT.as_secs()))))
    }

    async fn logout(&self, config: &Config, keys: &Keys) -> Result<(), Failure> {
        let request = RegisterRequest {
            version: CAPABILITY_VERSION,
            node_key: keys.node.public,
            old_node_key: None,
            auth: None,
            // Any time long gone (controlclient/direct.go).
            node_key_signature: None,
            expiry: DateTime::from_timestamp(123, 0),
            followup: String::new(),
            hostinfo: Some(hostinfo(config)),
            ephemeral: config.ephemeral,
        };
        let answer = self.register(&request).await?;
        if answer.error.is_empty() {
            Ok(())
        } else {
            Err(Failure::Refused(answer.error))
        }
    }

    async fn open_slowly(config: &Config, keys: &Keys) -> Result<Self, Failure> {
        let server = &config.login_server;
        let base = server.path().trim_end_matches('/').to_owned();
        let (mut http, mut socket) = connect(server, config.tls.clone()).await?;
        let key = get(
            server,
            Method::GET,
            &format!("{base}/key?v={CAPABILITY_VERSION}"),
        )?;
        let key = dial::body(http.send(key, StatusCode::OK).await?, MAX_ANSWER).await?;
        let OverTlsPublicKeyResponse { public_key } =
            serde_json::from_slice(&key).map_err(|error| {
                retry(format!(
                    "the answer to /key is not a control server's: {error}"
                ))
            })?;

        // The version is far below 65536: tailcfg.go adds a few a month.
        let version = CAPABILITY_VERSION as u16;
        let (pending, handshake) = noise::initiate(&keys.machine, &public_key, version);
        let mut upgrade = get(server, Method::POST, "/ts2021")?;
        let headers = upgrade.headers_mut();
        headers.insert(header::UPGRADE, HeaderValue::from_static(noise::UPGRADE));
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(noise::HANDSHAKE_HEADER, handshake.parse().map_err(retry)?);
        if !http.is_open().await {
            (http, socket) = connect(server, config.tls.clone()).await?;
        }
        let channel = pending
            .complete(http.upgrade(upgrade).await?)
            .await
            .map_err(retry)?;

        let (sender, driver) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(H2_PING)
            .keep_alive_timeout(H2_PONG)
            .handshake(TokioIo::new(channel))
            .await?;
        let driver = tokio::spawn(async move {
            if let Err(error) = driver.await {
                debug!(error = %dial::Error::from(error), "the connection to the control server broke");
            }
        });
        Ok(Self {
            sender,
            origin: format!("https://{}", authority(server)),
            base,
            socket: Arc::new(socket),
            _driver: Arc::new(AbortOnDropHandle::new(driver)),
        })
    }

    fn is_open(&self) -> bool {
        !self.sender.is_closed()
    }

    async fn post(&self, path: &str, body: &impl Serialize) -> Result<Response<Incoming>, Failure> {
        let body = serde_json::to_vec(body).map_err(retry)?;
        let request = Request::post(format!("{}{}{path}", self.origin, self.base))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::from(body))
            .map_err(retry)?;
        self.send(request).await
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Failure> {
        let mut sender = self.sender.clone();
        sender.ready().await?;
        Ok(sender.send_request(request).await?)
    }

    async fn register(&self, request: &RegisterRequest) -> Result<RegisterResponse, Failure> {
        const PATH: &str = "/machine/register";
        let response = self.post(PATH, request).await?;
        match response.status() {
            StatusCode::OK => {
                let answer = dial::body(response, MAX_ANSWER).await?;
                serde_json::from_slice(&answer).map_err(|error| {
                    retry(format!(
                        "the answer to the registration cannot be read: {error}"
                    ))
                })
            }
            // The server understood and does not want us; other errors may be a proxy's.
            StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let refusal = dial::refusal(PATH.into(), response).await;
                Err(Failure::Refused(refusal.to_string()))
            }
            _ => Err(unwelcome(PATH, response).await),
        }
    }

    /// Asks as tailnet lock's requests do: with a body, and without a change.
    async fn inquire<T: DeserializeOwned>(
        &self,
        path: &'static str,
        body: &impl Serialize,
    ) -> Result<T, Failure> {
        let request = Request::get(format!("{}{}{path}", self.origin, self.base))
            .body(Full::from(serde_json::to_vec(body).map_err(retry)?))
            .map_err(retry)?;
        let response = self.send(request).await?;
        if response.status() != StatusCode::OK {
            return Err(unwelcome(path, response).await);
        }
        let answer = dial::body(response, MAX_LOCK).await?;
        serde_json::from_slice(&answer)
            .map_err(|error| retry(format!("the answer to {path} cannot be read: {error}")))
    }

    async fn update(&self, request: &MapRequest) -> Result<(), Failure> {
        let response = self.post(MAP, request).await?;
        match response.status() {
            StatusCode::OK => Ok(()),
            _ => Err(unwelcome(MAP, response).await),
        }
    }

    async fn ping(self, url: Url, method: Method, body: &'static str) -> Result<(), Failure> {
        let request = Request::builder()
            .method(method)
            .uri(url.as_str())
            .body(Full::from(body))
            .map_err(retry)?;
        self.send(request).await.map(drop)
    }
}

/// What a node without handlers answers to a request that the server sends to it (c2n).
const NOT_SUPPORTED: &str = "HTTP/1.1 501 Not Implemented\r\n\
     Content-Type: text/plain; charset=utf-8\r\n\
     Content-Length: 27\r\n\
     \r\n\
     tailnode has no c2n service";

async fn head(url: Url, tls: Arc<rustls::ClientConfig>) -> Result<(), Failure> {
    let target = url.path().to_owned() + &url.query().map(|q| format!("?{q}")).unwrap_or_default();
    let request = get(&url, Method::HEAD, &target)?;
    let (mut http, _) = connect(&url, tls).await?;
    http.send(request, StatusCode::OK).await?;
    Ok(())
}

/// Takes what came of a map stream, which has no end.
fn take_frame(
    frame: Option<Result<Frame<Bytes>, hyper::Error>>,
    buffer: &mut BytesMut,
) -> Result<(), Failure> {
    let frame = frame.ok_or_else(|| retry("the control server ended the map stream"))?;
    if let Ok(data) = frame?.into_data() {
        buffer.extend_from_slice(&data);
    }
    Ok(())
}

/// Connects to the host of a URL.
async fn connect(url: &Url, tls: Arc<rustls::ClientConfig>) -> Result<(Http, Socket), Failure> {
    let secure = match url.scheme() {
        "https" => true,
        "http" => false,
        _ => {
            return Err(Failure::Refused(format!(
                "{url} is neither an https nor an http URL"
            )));
        }
    };
    let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
        return Err(Failure::Refused(format!("{url} names no host")));
    };
    // URLs alone put IPv6 addresses in brackets.
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let tcp = dial::tcp(host, port).await?;
    let socket = Socket::of(&tcp).map_err(retry)?;
    let stream = if secure {
        Either::Right(dial::tls(tcp, host, tls).await?)
    } else {
        Either::Left(tcp)
    };
    Ok((Http::open(stream).await?, socket))
}

/// A request without a body to the host of a URL.
fn get(url: &Url, method: Method, target: &str) -> Result<Request<Full<Bytes>>, Failure> {
    Request::builder()
        .method(method)
        .uri(target)
        .header(header::HOST, authority(url))
        .body(Full::default())
        .map_err(retry)
}

/// Host, and port where it is not the scheme's own.
fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port()
        .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// The failure that an unwelcome answer makes, minding when the server wants to be asked again.
async fn unwelcome(path: &str, response: Response<Incoming>) -> Failure {
    let status = response.status();
    let limited = status == StatusCode::TOO_MANY_REQUESTS;
    let asked = response.headers().get(header::RETRY_AFTER);
    let seconds = asked
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.parse().ok());
    let after = match seconds.map(Duration::from_secs) {
        Some(after) if after > Duration::ZERO => Some(after.min(MAX_SLEEP)),
        // As tailscaled does: 5 to 10 s where the server names no time.
        _ => limited.then(|| Duration::from_secs(5).mul_f64(1.0 + rand::random::<f64>())),
    };
    let error = dial::refusal(path.into(), response).await.to_string();
    if path == MAP && status.is_client_error() && !limited {
        return Failure::Unknown(error);
    }
    Failure::Retry { error, after }
}

/// Waits for a moment of the server's calendar; for ever where there is none.
async fn moment(clock: Clock, at: Option<DateTime<Utc>>) {
    let Some(at) = at else {
        return std::future::pending().await;
    };
    while let Ok(left) = (at - clock.now()).to_std() {
        sleep(left).await;
    }
}

fn hostinfo(config: &Config) -> Hostinfo {
    // Of interest to people who look at the list of machines; nothing depends on it.
    let os_version = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Hostinfo {
        ipn_version: concat!(env!("CARGO_PKG_VERSION"), "-tailnode").into(),
        os: "linux".into(),
        os_version: os_version.trim().into(),
        container: Some(true),
        hostname: config.hostname.clone(),
        machine: std::env::consts::ARCH.into(),
        go_arch: match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "loongarch64" => "loong64",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "powerpc64" => "ppc64",
            same => same,
        }
        .into(),
        app: "tailnode".into(),
        request_tags: config.tags.clone(),
        routable_ips: config.routes.clone(),
        no_logs_no_support: true,
        ..Hostinfo::default()
    }
}

#[cfg(test)]
mod tests {
    use tailnode_control_server::{Config as ServerConfig, KeySpec, Server};
    use tempfile::TempDir;

    use super::*;
    use crate::netmap::Netmap;

    /// Waiting for longer is a failure of the test, not of the session.
    const PATIENCE: Duration = Duration::from_secs(30);

    async fn server(state: &TempDir) -> Server {
        Server::start(ServerConfig::new(state.path()))
            .await
            .unwrap()
    }

    fn key(server: &Server, ephemeral: bool) -> Option<AuthKey> {
        let spec = KeySpec {
            reusable: true,
            ephemeral,
            ..KeySpec::default()
        };
        Some(AuthKey::parse(&server.create_key(spec).unwrap()).unwrap())
    }

    /// A session and what it told.
    struct Client {
        handle: Handle,
        events: mpsc::Receiver<Event>,
        keys: Keys,
        netmap: Netmap,
        login: Login,
        streams: usize,
    }

    impl Client {
        fn new(url: &Url, hostname: &str, auth_key: Option<AuthKey>) -> Self {
            Self::with(Keys::random(), url, hostname, auth_key)
        }

        fn with(keys: Keys, url: &Url, hostname: &str, auth_key: Option<AuthKey>) -> Self {
            Self::of(keys, Self::config(url, hostname, auth_key))
        }

        fn config(url: &Url, hostname: &str, auth_key: Option<AuthKey>) -> Config {
            Config {
                login_server: url.clone(),
                auth_key,
                hostname: hostname.into(),
                tags: Vec::new(),
                routes: Vec::new(),
                ephemeral: false,
                known: false,
                lock: Lock::Off,
                tls: dial::tls_config(),
            }
        }

        fn of(keys: Keys, config: Config) -> Self {
            let (events_tx, events) = mpsc::channel(16);
            Self {
                handle: spawn(config, keys.clone(), events_tx),
                events,
                keys,
                netmap: Netmap::default(),
                login: Login::Starting,
                streams: 0,
            }
        }

        /// Takes events until all is as it should be.
        async fn until(&mut self, right: impl Fn(&Self) -> bool) {
            let wait = async {
                while !right(self) {
                    match self.events.recv().await.expect("the session ended") {
                        Event::Login(login) => self.login = login,
                        Event::Map {
                            response,
                            first: true,
                        } => {
                            self.netmap.restart(*response, Utc::now());
                            self.streams += 1;
                        }
                        Event::Map {
                            response,
                            first: false,
                        } => {
                            self.netmap.apply(*response, Utc::now());
                        }
                        Event::Lock(_) => {}
                        Event::Keys { keys, kept } => {
                            self.keys = keys;
                            kept.send(()).unwrap();
                        }
                    }
                }
            };
            if timeout(PATIENCE, wait).await.is_err() {
                panic!("still {:?} with {:?}", self.login, self.netmap);
            }
        }

        async fn running(&mut self) {
            self.until(|client| client.login == Login::Running).await;
        }

        fn peer(&self, name: &str) -> Option<&tailnode_wire::tailcfg::Node> {
            self.netmap
                .peers
                .values()
                .map(Arc::as_ref)
                .find(|peer| peer.name.starts_with(name))
        }
    }

    #[tokio::test]
    async fn two_nodes_join_and_hear_of_each_other() {
        let state = TempDir::new().unwrap();
        let server = server(&state).await;
        let mut a = Client::new(server.url(), "a", key(&server, false));
        a.running().await;
        assert_eq!(a.netmap.myself.key, a.keys.node.public);
        assert!(a.netmap.myself.name.starts_with("a."));
        assert_eq!(a.netmap.derp_map.regions.len(), 1);

        let mut b = Client::new(server.url(), "b", key(&server, true));
        b.until(|b| b.peer("a").is_some()).await;
        let b_key = b.keys.node.public;
        a.until(|a| {
            a.peer("b")
                .is_some_and(|b| b.key == b_key && b.online == Some(true))
        })
        .await;
        assert_eq!(a.peer("b").unwrap().disco_key, Some(b.keys.disco.public));

        let endpoint: SocketAddr = "192.0.2.7:41641".parse().unwrap();
        let net_info = NetInfo {
            preferred_derp: 900,
            ..NetInfo::default()
        };
        b.handle.advertise(Advertised {
            endpoints: vec![(endpoint, EndpointType::Local)],
            net_info,
        });
        a.until(|a| {
            a.peer("b")
                .is_some_and(|b| b.endpoints == [endpoint] && b.home_derp == 900)
        })
        .await;

        b.handle.logout(PATIENCE).await.unwrap();
        a.until(|a| a.peer("b").is_none()).await;
        assert_eq!(server.nodes().len(), 1);
        assert_eq!(a.streams, 1);
    }

    #[tokio::test]
    async fn without_a_key_a_person_lets_it_in() {
        let state = TempDir::new().unwrap();
        let server = server(&state).await;
        let mut client = Client::new(server.url(), "a", None);
        client
            .until(|c| matches!(c.login, Login::NeedsLogin { .. }))
            .await;
        let Login::NeedsLogin { url, .. } = &client.login else {
            unreachable!()
        };
        server.approve(url.rsplit('/').next().unwrap()).unwrap();
        client.running().await;
    }

    #[tokio::test]
    async fn a_wrong_key_is_refused_in_the_servers_words() {
        let state = TempDir::new().unwrap();
        let server = server(&state).await;
        let mut client = Client::new(server.url(), "a", AuthKey::parse("tskey-wrong").ok());
        client
            .until(|c| matches!(c.login, Login::Refused { .. }))
            .await;
        let Login::Refused { error } = &client.login else {
            unreachable!()
        };
        assert!(error.contains("auth key"), "{error}");
        assert!(!error.contains("tskey-wrong"), "{error}");
    }

    /// Stands in for Tailscale's API: gives a token, and for it a key of the server's. Tells what it
    /// was asked, and says no to all once it was told to.
    async fn api(
        server: Arc<Server>,
        open: watch::Receiver<bool>,
    ) -> (String, mpsc::Receiver<String>) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let (asked_tx, asked) = mpsc::channel(16);
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut text = String::new();
                let length = |text: &str| {
                    let (head, body) = text.split_once("\r\n\r\n")?;
                    let length = head
                        .to_lowercase()
                        .split_once("content-length: ")?
                        .1
                        .to_owned();
                    Some(body.len() >= length.lines().next()?.parse().unwrap())
                };
                while length(&text) != Some(true) {
                    let mut chunk = [0; 4096];
                    let read = stream.read(&mut chunk).await.unwrap();
                    text += std::str::from_utf8(&chunk[..read]).unwrap();
                }
                let (status, body) = match text.split(' ').nth(1).unwrap() {
                    _ if !*open.borrow() => {
                        ("401 Unauthorized", r#"{"message":"no such client"}"#.into())
                    }
                    "/api/v2/oauth/token" => ("200 OK", r#"{"access_token":"TTTT"}"#.to_owned()),
                    _ => {
                        let tags = ["tag:web".to_owned()].into();
                        let spec = KeySpec {
                            tags,
                            ..KeySpec::default()
                        };
                        let key = server.create_key(spec).unwrap();
                        (
                            "200 OK",
                            serde_json::json!({ "id": "k", "key": key }).to_string(),
                        )
                    }
                };
                let length = body.len();
                let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}");
                stream.write_all(answer.as_bytes()).await.unwrap();
                if asked_tx.send(text).await.is_err() {
                    return;
                }
            }
        });
        (base, asked)
    }

    #[tokio::test]
    async fn an_oauth_client_makes_a_key_for_each_time_that_a_node_joins() {
        let state = TempDir::new().unwrap();
        let server = Arc::new(server(&state).await);
        let (open_tx, open) = watch::channel(true);
        let (base, mut asked) = api(server.clone(), open).await;
        let secret = format!("tskey-client-QQQQ?preauthorized=true&baseURL={base}");
        let join = |hostname| {
            let mut config = Client::config(server.url(), hostname, AuthKey::parse(&secret).ok());
            config.tags = vec!["tag:web".into()];
            Client::of(Keys::random(), config)
        };
        let mut client = join("a");
        client.running().await;
        let for_token = asked.recv().await.unwrap();
        assert!(
            for_token.contains("client_secret=tskey-client-QQQQ"),
            "{for_token}"
        );
        assert!(!for_token.contains("preauthorized"), "{for_token}");
        let for_key = asked.recv().await.unwrap().to_lowercase();
        assert!(for_key.contains("authorization: bearer tttt"), "{for_key}");
        assert!(for_key.contains(r#""tags":["tag:web"]"#), "{for_key}");
        assert!(client.netmap.myself.tags.contains(&"tag:web".to_owned()));

        // The first one is used up; nobody must log in.
        server.expire_node(client.netmap.myself.id).unwrap();
        let streams = client.streams;
        client.until(|c| c.streams > streams).await;
        client.running().await;
        asked.recv().await.unwrap();
        asked.recv().await.unwrap();

        open_tx.send_replace(false);
        let mut refused = join("b");
        refused
            .until(|c| matches!(c.login, Login::Refused { .. }))
            .await;
        let Login::Refused { error } = &refused.login else {
            unreachable!()
        };
        assert!(error.contains("no such client"), "{error}");
        assert!(!error.contains("QQQQ"), "{error}");
    }

    #[tokio::test]
    async fn it_waits_for_a_server_that_is_away() {
        let state = TempDir::new().unwrap();
        let first = server(&state).await;
        let (url, key) = (first.url().clone(), key(&first, false));
        let mut client = Client::new(&url, "a", key);
        client.running().await;
        first.shutdown().await;
        client
            .until(|c| matches!(c.login, Login::Offline { .. }))
            .await;
        let Login::Offline { error } = &client.login else {
            unreachable!()
        };
        assert!(
            error.contains(url.as_str()) && error.contains("refused"),
            "{error}"
        );

        let listen = url.socket_addrs(|| None).unwrap()[0];
        let again = ServerConfig {
            listen,
            ..ServerConfig::new(state.path())
        };
        let _again = Server::start(again).await.unwrap();
        client.running().await;
        assert_eq!(client.streams, 2);
    }

    #[tokio::test]
    async fn an_expired_key_is_replaced() {
        let state = TempDir::new().unwrap();
        let server = server(&state).await;
        let mut client = Client::new(server.url(), "a", key(&server, false));
        client.running().await;
        let old = client.keys.clone();
        let address = client.netmap.myself.addresses.clone();
        server.expire_node(client.netmap.myself.id).unwrap();
        client
            .until(|c| c.keys != old && c.netmap.myself.key == c.keys.node.public)
            .await;
        client.running().await;
        assert_eq!(client.keys.machine, old.machine);
        assert_eq!(client.netmap.myself.addresses, address);
    }

    /// As after a power cut when the server had agreed to a new key and we had not heard of it.
    #[tokio::test]
    async fn a_node_that_ended_while_its_key_was_replaced_is_the_same_after() {
        let state = TempDir::new().unwrap();
        let server = server(&state).await;
        let auth_key = key(&server, false);
        for given in [auth_key.clone(), None] {
            let mut client = Client::new(server.url(), "a", auth_key.clone());
            client.running().await;
            let myself = client.netmap.myself.clone();
            server.expire_node(myself.id).unwrap();
            client.until(|c| c.keys.next.is_some()).await;
            let kept = client.keys.clone();
            client.until(|c| c.keys.next.is_none()).await;
            drop(client);

            let mut client = Client::with(kept.clone(), server.url(), "a", given);
            client.running().await;
            assert_eq!(client.netmap.myself.id, myself.id);
            assert_eq!(client.netmap.myself.addresses, myself.addresses);
            assert_eq!(client.keys.next, None);
            assert_eq!(client.netmap.myself.key, client.keys.node.public);
        }
    }

    #[tokio::test]
    async fn a_deleted_node_says_so_and_waits_for_a_person() {
        let state = TempDir::new().unwrap();
        let server = server(&state).await;
        let mut client = Client::new(server.url(), "a", key(&server, false));
        client.running().await;
        let id = client.netmap.myself.id;
        server.delete_node(id).unwrap();
        client
            .until(|c| matches!(&c.login, Login::NeedsLogin { reason, .. } if reason.contains("deleted")))
            .await;
        let Login::NeedsLogin { url, .. } = &client.login else {
            unreachable!()
        };
        server.approve(url.rsplit('/').next().unwrap()).unwrap();
        client.until(|c| c.netmap.myself.id != id).await;
        client.running().await;
    }

    #[tokio::test]
    async fn a_node_that_an_expired_key_would_let_back_in_asks_a_person() {
        let state = TempDir::new().unwrap();
        let server = server(&state).await;
        let once = AuthKey::parse(&server.create_key(KeySpec::default()).unwrap()).unwrap();
        let mut client = Client::new(server.url(), "a", Some(once));
        client.running().await;
        let (old, address) = (client.keys.clone(), client.netmap.myself.addresses.clone());
        server.expire_node(client.netmap.myself.id).unwrap();
        client
            .until(|c| matches!(&c.login, Login::NeedsLogin { reason, .. } if reason.contains("used up")))
            .await;
        let Login::NeedsLogin { url, .. } = &client.login else {
            unreachable!()
        };
        server.approve(url.rsplit('/').next().unwrap()).unwrap();
        client.running().await;
        assert_ne!(client.keys.node, old.node);
        assert_eq!(client.netmap.myself.addresses, address);
    }

    #[tokio::test]
    async fn a_server_that_is_none_is_named() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let url: Url = format!("http://{address}").parse().unwrap();
        let mut client = Client::new(&url, "a", None);
        client
            .until(|c| matches!(c.login, Login::Offline { .. }))
            .await;
        // A handle that cannot log out says so and lets go.
        let told = client.handle.logout(Duration::from_secs(1)).await;
        told.unwrap_err();
    }

    #[test]
    fn a_server_that_repeats_the_key_does_not_show_it() {
        let words = || "no key tskey-auth-QQQQ".to_owned();
        for mut login in [
            Login::NeedsLogin {
                url: "https://a".into(),
                reason: words(),
            },
            Login::Offline { error: words() },
            Login::Refused { error: words() },
        ] {
            hide(&Secret::new("tskey-auth-QQQQ"), &mut login);
            let shown = format!("{login:?}");
            assert!(shown.contains("no key [redacted]"), "{shown}");
        }
    }

    #[test]
    fn the_c2n_answer_is_whole() {
        let (head, body) = NOT_SUPPORTED.split_once("\r\n\r\n").unwrap();
        assert!(head.ends_with(&format!("Content-Length: {}", body.len())));
    }

    #[test]
    fn authorities_keep_odd_ports() {
        for (url, wanted) in [
            ("https://a.example", "a.example"),
            ("http://a.example:80/x", "a.example"),
            ("http://a.example:8080", "a.example:8080"),
            ("https://[fd00::1]:8443/", "[fd00::1]:8443"),
        ] {
            assert_eq!(authority(&url.parse().unwrap()), wanted);
        }
    }
}
