//! Connections to the relays, which carry packets while no direct path is known.
//!
//! A *line* is one connection to one region, held by its own task: the home region's for good, so
//! that peers find us there, the others' while packets go over them. Lines are made when first
//! needed and made again when they break. A home line that stays broken is *lost*: it is tried until
//! it stands again, so that its region can be home again, while another region is.

use std::{
    collections::{BTreeSet, HashMap},
    future::Future,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, Request, header};
use http_body_util::Full;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tailnode_wire::{
    derp::{self as wire, ClientInfo, Codec, Frame, ServerInfo},
    keys::{DerpServerPublicKey, NodeKeyPair, NodePublicKey},
    tailcfg::{DerpMap, DerpNode, DerpRegion, RegionId},
};
use tokio::{
    net::{TcpStream, lookup_host},
    runtime,
    sync::{
        Notify,
        mpsc::{self, error::TrySendError},
        watch,
    },
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::{codec::Framed, either::Either, task::AbortOnDropHandle};
use tracing::{Instrument, debug, info, trace, warn};

use crate::dial::{self, Backoff, Http};

/// How long a new line may take, from DNS to DERP (derphttp_client.go).
const CONNECT: Duration = Duration::from_secs(10);
/// How long one of a region's servers may take before the next is tried.
const CONNECT_ONE: Duration = Duration::from_secs(3);
/// A line that is not home is closed after so long without a packet (magicsock/derp.go).
const IDLE: Duration = Duration::from_secs(60);
/// A line is dead after this silence: two keepalives.
const SILENCE: Duration = wire::KEEP_ALIVE.saturating_mul(2);
/// The home line is lost after so long without a connection: a relay that restarts takes less.
const LOST: Duration = Duration::from_secs(10);
/// How long the relay may refuse to take what we send.
const STUCK: Duration = Duration::from_secs(10);
/// Packets that wait for a line, and bound what an unreachable relay costs.
const QUEUE: usize = 128;
/// The longest pause that a restarting relay may ask for.
const MAX_RESTART: Duration = Duration::from_secs(60);
/// Port of a relay that speaks plain http (derphttp_client.go).
const HTTP_PORT: u16 = 3340;
const HTTPS_PORT: u16 = 443;

/// A packet that came over a relay.
#[derive(Clone, Debug)]
pub struct Incoming {
    /// The relay's region.
    pub region: RegionId,
    /// Who sent it, in the relay's words.
    pub from: NodePublicKey,
    /// The packet.
    pub packet: Bytes,
}

/// All relays of a node. They close when this is dropped.
pub struct Relays {
    shared: Arc<Shared>,
}

struct Shared {
    tls: Arc<ClientConfig>,
    plain_http: bool,
    incoming: mpsc::Sender<Incoming>,
    home: watch::Sender<RegionId>,
    state: Mutex<State>,
    dropped: AtomicU64,
    /// A line was lost, or found again.
    changed: Notify,
    /// Packets are sent from wherever they come up; lines live where the node was made.
    runtime: runtime::Handle,
}

struct State {
    key: NodeKeyPair,
    map: DerpMap,
    lines: HashMap<RegionId, Line>,
}

struct Line {
    queue: mpsc::Sender<(NodePublicKey, Bytes)>,
    standing: watch::Receiver<Standing>,
    _task: AbortOnDropHandle<()>,
}

/// How a line stands.
#[derive(Clone, Debug, Default)]
struct Standing {
    /// Packets leave at once.
    connected: bool,
    /// Our end of its last connection.
    local: Option<IpAddr>,
    /// Why there was no connection when one was last tried.
    failure: Option<String>,
    /// It was home, and could not be connected for [`LOST`].
    lost: bool,
}

impl Relays {
    /// Makes ready; nothing is connected before the map and the home are known.
    ///
    /// `plain_http` lets relays on odd ports be tried without TLS, too: the tailnet's own, where
    /// its control server speaks plain http. Packets are sealed in any case.
    ///
    /// Must be called within a Tokio runtime, where the connections will live.
    pub fn new(
        key: NodeKeyPair,
        tls: Arc<ClientConfig>,
        plain_http: bool,
        incoming: mpsc::Sender<Incoming>,
    ) -> Self {
        let state = State {
            key,
            map: DerpMap::default(),
            lines: HashMap::new(),
        };
        Self {
            shared: Arc::new(Shared {
                tls,
                plain_http,
                incoming,
                home: watch::channel(0).0,
                state: Mutex::new(state),
                dropped: AtomicU64::new(0),
                changed: Notify::new(),
                runtime: runtime::Handle::current(),
            }),
        }
    }

    /// Takes a new map; lines to regions that it describes as before stay.
    pub fn set_map(&self, map: DerpMap) {
        let mut state = self.shared.state();
        let old = std::mem::replace(&mut state.map, map);
        let State { map, lines, .. } = &mut *state;
        lines.retain(|region, _| old.regions.get(region) == map.regions.get(region));
        self.shared.open_home(&mut state);
    }

    /// The host has these addresses now: lines from any other are made anew, since nothing would
    /// tell for minutes that they lead nowhere.
    pub fn set_addresses(&self, ours: &[IpAddr]) {
        let mut state = self.shared.state();
        state.lines.retain(|_, line| {
            let local = line.standing.borrow().local;
            local.is_none_or(|ip| ip.is_loopback() || ours.contains(&ip))
        });
        self.shared.open_home(&mut state);
    }

    /// Takes a new node key; all lines are made anew, since it is our name there.
    pub fn set_key(&self, key: NodeKeyPair) {
        let mut state = self.shared.state();
        state.key = key;
        state.lines.clear();
        self.shared.open_home(&mut state);
    }

    /// Makes a region our home: its line stays open. 0: none.
    pub fn set_home(&self, region: RegionId) {
        let mut state = self.shared.state();
        self.shared.home.send_replace(region);
        self.shared.open_home(&mut state);
    }

    /// Sends a packet to a peer over a region. Never waits: a packet that finds no room, or a
    /// region not on the map, is dropped and counted.
    pub fn send(&self, region: RegionId, to: &NodePublicKey, packet: Bytes) {
        let mut state = self.shared.state();
        let sent = packet.len() <= wire::MAX_PACKET
            && self
                .shared
                .line(&mut state, region)
                .is_some_and(|line| line.queue.try_send((*to, packet)).is_ok());
        drop(state);
        if !sent {
            self.shared.drop_packets(1);
        }
    }

    /// The regions that were home and cannot be reached. They are tried all the time.
    pub fn lost(&self) -> BTreeSet<RegionId> {
        let state = self.shared.state();
        let lost = state
            .lines
            .iter()
            .filter(|(_, line)| line.standing.borrow().lost);
        lost.map(|(region, _)| *region).collect()
    }

    /// Resolves when a region was lost or found again since this resolved last.
    pub async fn changed(&self) {
        self.shared.changed.notified().await;
    }

    /// What is wrong with regions that are home, or were until they were lost.
    pub fn troubles(&self) -> Vec<String> {
        let state = self.shared.state();
        let home = *self.shared.home.borrow();
        let mut troubles = Vec::new();
        for (region, line) in &state.lines {
            let standing = line.standing.borrow();
            if let Some(failure) = &standing.failure
                && (*region == home || standing.lost)
            {
                let code = state
                    .map
                    .regions
                    .get(region)
                    .map(|found| &*found.region_code);
                let code = code.unwrap_or_default();
                troubles.push(format!("no connection to the relay \"{code}\": {failure}"));
            }
        }
        troubles.sort();
        troubles
    }

    /// Whether packets over the region leave at once.
    #[cfg(test)]
    pub fn connected(&self, region: RegionId) -> bool {
        let state = self.shared.state();
        state
            .lines
            .get(&region)
            .is_some_and(|line| line.standing.borrow().connected)
    }

    /// Packets dropped so far: for want of a line, or of room in its queue.
    #[cfg(test)]
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// The region whose servers answer first by TCP: a home for networks where STUN is not
    /// answered. `None` if no region that may be a home answers; lost ones are not asked.
    pub fn nearest(&self) -> impl Future<Output = Option<RegionId>> + Send + use<> {
        let shared = self.shared.clone();
        let lost = self.lost();
        let regions: Vec<DerpRegion> = shared
            .state()
            .map
            .regions
            .values()
            .filter(|region| !region.avoid && !region.no_measure_no_home)
            .filter(|region| !lost.contains(&region.region_id))
            .cloned()
            .collect();
        async move {
            let mut answers = JoinSet::new();
            for region in regions {
                let plain = shared.plain_http;
                answers.spawn(async move {
                    let id = region.region_id;
                    timeout(CONNECT, connect_region(&region, plain))
                        .await
                        .ok()?
                        .ok()
                        .map(|_| id)
                });
            }
            while let Some(answer) = answers.join_next().await {
                if let Ok(Some(region)) = answer {
                    return Some(region);
                }
            }
            None
        }
    }
}

impl Drop for Relays {
    fn drop(&mut self) {
        // The tasks hold what holds their handles.
        self.shared.state().lines.clear();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // No update of the state is left half done by a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drop_packets(&self, count: u64) {
        self.dropped.fetch_add(count, Ordering::Relaxed);
        trace!(count, "dropped packets for a relay");
    }

    /// After lines may have gone.
    fn open_home(self: &Arc<Self>, state: &mut State) {
        self.changed.notify_one();
        let home = *self.home.borrow();
        if home != 0 && self.line(state, home).is_none() {
            warn!(home, "the home relay is not on the map");
        }
    }

    /// The line to a region, made if there is none; `None` if the map does not have the region.
    fn line<'a>(self: &Arc<Self>, state: &'a mut State, id: RegionId) -> Option<&'a Line> {
        if !state.lines.contains_key(&id) {
            let region = state.map.regions.get(&id)?.clone();
            let (queue_tx, queue) = mpsc::channel(QUEUE);
            let (standing_tx, standing) = watch::channel(Standing::default());
            let operator = Operator {
                home: self.home.subscribe(),
                shared: self.clone(),
                key: state.key.clone(),
                region,
                id,
                queue,
                standing: standing_tx,
                plain: self.plain_http,
                announced: false,
                pending: None,
            };
            let span = tracing::info_span!("relay", region = operator.region.region_code);
            let task = self.runtime.spawn(operator.run().instrument(span));
            let line = Line {
                queue: queue_tx,
                standing,
                _task: AbortOnDropHandle::new(task),
            };
            state.lines.insert(id, line);
        }
        state.lines.get(&id)
    }
}

/// Holds one line.
struct Operator {
    shared: Arc<Shared>,
    key: NodeKeyPair,
    id: RegionId,
    region: DerpRegion,
    queue: mpsc::Receiver<(NodePublicKey, Bytes)>,
    standing: watch::Sender<Standing>,
    home: watch::Receiver<RegionId>,
    /// Speak http first at the next attempt, where the port allows. The tailnet's own relay speaks
    /// it as its control server does, others' do not: which one this is, trying tells.
    plain: bool,
    /// What the relay was last told of whether it is home.
    announced: bool,
    /// Came, and found no room where it should go.
    pending: Option<Incoming>,
}

type Wire = Framed<TokioIo<Upgraded>, Codec>;

/// Why a line ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("unused")]
    Idle,
    #[error("the relay restarts")]
    Restarting(Duration),
    #[error("the node stopped")]
    Unheard,
    #[error("nothing heard for {} s", SILENCE.as_secs())]
    Silent,
    #[error("the relay takes nothing")]
    Stuck,
    #[error("the relay hung up")]
    Closed,
    #[error("no connection in {} s", CONNECT.as_secs())]
    Slow,
    #[error("no server of the region can be used")]
    NoServer,
    #[error("{0} is no certificate hash")]
    Pin(String),
    #[error(transparent)]
    Dial(#[from] dial::Error),
    #[error(transparent)]
    Wire(#[from] wire::Error),
}

impl Operator {
    async fn run(mut self) {
        let mut backoff = Backoff::default();
        // What the log was told of since the line stood.
        let mut told = BTreeSet::new();
        let mut down = Instant::now();
        loop {
            let opened = timeout(CONNECT, self.open())
                .await
                .unwrap_or(Err(End::Slow));
            let end = match opened {
                Ok((mut wire, server)) => {
                    let since = Instant::now();
                    let end = self.converse(&mut wire, &server).await;
                    if self.standing.borrow().connected {
                        self.standing
                            .send_modify(|standing| standing.connected = false);
                        told.clear();
                        down = Instant::now();
                    }
                    if since.elapsed() >= IDLE {
                        backoff.reset();
                    }
                    end
                }
                Err(end) => end,
            };
            match &end {
                End::Idle if self.retire() => {
                    debug!("closed: {end}");
                    return;
                }
                // A packet came just now.
                End::Idle => continue,
                End::Unheard => return,
                End::Restarting(pause) => {
                    debug!(?pause, "closed: {end}");
                    sleep(*pause).await;
                }
                // Not each time: a relay may be away for days.
                _ if self.is_home() && told.insert(end.to_string()) => {
                    warn!("no connection to the home relay: {end}");
                }
                _ => debug!("closed: {end}"),
            }
            self.fail(&end, down);
            // What waited for a broken line is too old: WireGuard has sent it again, or will.
            let mut late = 0;
            while self.queue.try_recv().is_ok() {
                late += 1;
            }
            if late > 0 {
                self.shared.drop_packets(late);
            }
            backoff.wait().await;
            if self.retire() {
                return;
            }
        }
    }

    fn is_home(&self) -> bool {
        *self.home.borrow() == self.id
    }

    /// Notes why there is no connection since `down`.
    fn fail(&self, end: &End, down: Instant) {
        let lost = self.is_home() && down.elapsed() >= LOST;
        let newly = lost && !self.standing.borrow().lost;
        self.standing.send_modify(|standing| {
            standing.failure = Some(end.to_string());
            standing.lost |= lost;
        });
        if newly {
            warn!("the home relay is lost: another region replaces it, if there is one");
            self.shared.changed.notify_one();
        }
    }

    /// Takes the line off the list if nobody needs it.
    fn retire(&self) -> bool {
        let mut state = self.shared.state();
        if self.is_home() || self.standing.borrow().lost || !self.queue.is_empty() {
            return false;
        }
        // Another line may be in our place already.
        if state
            .lines
            .get(&self.id)
            .is_some_and(|line| line.standing.same_channel(&self.standing.subscribe()))
        {
            state.lines.remove(&self.id);
        }
        true
    }

    async fn open(&mut self) -> Result<(Wire, DerpServerPublicKey), End> {
        let opened = self.open_as(self.plain).await;
        let tls_wanted = self.plain
            && matches!(
                opened,
                Err(End::Dial(dial::Error::Http(_) | dial::Error::Status { .. }))
            );
        let opened = if tls_wanted {
            self.plain = false;
            self.open_as(false).await
        } else {
            opened
        };
        if let Err(End::Dial(dial::Error::Tls { .. })) = opened {
            self.plain = self.shared.plain_http;
        }
        opened
    }

    async fn open_as(&self, plain: bool) -> Result<(Wire, DerpServerPublicKey), End> {
        let (node, tcp, plain) = connect_region(&self.region, plain).await?;
        let local = tcp.local_addr().ok();
        self.standing.send_modify(|standing| {
            standing.local = local.map(|address| address.ip().to_canonical());
        });
        let stream = if plain {
            Either::Left(tcp)
        } else {
            let name = match &*node.cert_name {
                "" => &node.host_name,
                pin if pin.starts_with(PIN) => &node.host_name,
                name => name,
            };
            Either::Right(dial::tls(tcp, name, tls_for(node, &self.shared.tls)?).await?)
        };
        let request = Request::get("/derp")
            .header(header::HOST, &node.host_name)
            .header(header::UPGRADE, HeaderValue::from_static(wire::UPGRADE))
            .header(header::CONNECTION, HeaderValue::from_static("Upgrade"))
            .body(Full::default())
            .map_err(|error| dial::Error::Http(error.to_string()))?;
        let upgraded = Http::open(stream).await?.upgrade(request).await?;
        let mut wire = Framed::new(upgraded, Codec);
        match wire.next().await.ok_or(End::Closed)?? {
            Frame::ServerKey(server) => {
                wire.send(ClientInfo::default().seal(&self.key, &server)?)
                    .await?;
                Ok((wire, server))
            }
            _ => Err(wire::Error::Magic.into()),
        }
    }

    /// Carries packets both ways until the line ends.
    async fn converse(&mut self, wire: &mut Wire, server: &DerpServerPublicKey) -> End {
        self.announced = false;
        let begun = Instant::now();
        let mut heard = begun;
        let mut used = Instant::now();
        let incoming = self.shared.incoming.clone();
        loop {
            let home = *self.home.borrow_and_update() == self.id;
            let welcome = self.standing.borrow().connected;
            if home != self.announced {
                self.announced = home;
                // Peers that knew it as home still send there for a while.
                used = Instant::now();
                if let Err(end) = send(wire, [Frame::NotePreferred(home)]).await {
                    return end;
                }
            }
            tokio::select! {
                // Reading stops while there is no room: the relay notices, and drops for us.
                frame = wire.next(), if self.pending.is_none() => {
                    heard = Instant::now();
                    let frame = match frame {
                        Some(Ok(frame)) => frame,
                        Some(Err(error)) => return error.into(),
                        None => return End::Closed,
                    };
                    if matches!(frame, Frame::RecvPacket { .. }) {
                        used = heard;
                    }
                    if let Err(end) = self.take(frame, wire, server).await {
                        return end;
                    }
                }
                permit = incoming.reserve(), if self.pending.is_some() => match permit {
                    Ok(permit) => if let Some(packet) = self.pending.take() {
                        permit.send(packet);
                    },
                    Err(_) => return End::Unheard,
                },
                Some(first) = self.queue.recv() => {
                    used = Instant::now();
                    let queue = &mut self.queue;
                    // Whatever else waits goes in the same write.
                    let rest = std::iter::from_fn(|| queue.try_recv().ok()).take(QUEUE);
                    let frames = std::iter::once(first)
                        .chain(rest)
                        .map(|(dst, payload)| Frame::SendPacket { dst, payload });
                    if let Err(end) = send(wire, frames).await {
                        return end;
                    }
                }
                Ok(()) = self.home.changed() => {}
                () = sleep_until(heard + SILENCE), if self.pending.is_none() => return End::Silent,
                () = sleep_until(begun + CONNECT), if !welcome => return End::Slow,
                () = sleep_until(used + IDLE), if !home => return End::Idle,
            }
        }
    }

    async fn take(
        &mut self,
        frame: Frame,
        wire: &mut Wire,
        server: &DerpServerPublicKey,
    ) -> Result<(), End> {
        match frame {
            Frame::RecvPacket { src, payload } => {
                let packet = Incoming {
                    region: self.id,
                    from: src,
                    packet: payload,
                };
                match self.shared.incoming.try_send(packet) {
                    Ok(()) => {}
                    Err(TrySendError::Full(packet)) => self.pending = Some(packet),
                    Err(TrySendError::Closed(_)) => return Err(End::Unheard),
                }
            }
            Frame::Ping(data) => send(wire, [Frame::Pong(data)]).await?,
            Frame::ServerInfo { sealed } => {
                let info = ServerInfo::open(&sealed, server, &self.key.private)?;
                let lost = self.standing.borrow().lost;
                self.standing.send_modify(|standing| {
                    standing.connected = true;
                    standing.failure = None;
                    standing.lost = false;
                });
                if lost {
                    self.shared.changed.notify_one();
                }
                info!(?info, "connected");
            }
            Frame::Health(problem) if problem.is_empty() => info!("the relay is well again"),
            Frame::Health(problem) => warn!(problem, "the relay is unwell"),
            Frame::Restarting { reconnect_in, .. } => {
                return Err(End::Restarting(reconnect_in.min(MAX_RESTART)));
            }
            // Paths time out by themselves; the peer may be at another relay by now.
            Frame::PeerGone { key, reason } => trace!(%key, ?reason, "peer gone"),
            Frame::KeepAlive | Frame::Pong(_) | Frame::PeerPresent { .. } => {}
            other => trace!(?other, "unexpected frame"),
        }
        Ok(())
    }
}

async fn send(wire: &mut Wire, frames: impl IntoIterator<Item = Frame>) -> Result<(), End> {
    let write = async {
        for frame in frames {
            wire.feed(frame).await?;
        }
        wire.flush().await
    };
    timeout(STUCK, write)
        .await
        .map_err(|_| End::Stuck)?
        .map_err(End::from)
}

/// Connects to the first of a region's servers that answers; the flag says whether without TLS.
async fn connect_region(
    region: &DerpRegion,
    plain: bool,
) -> Result<(&DerpNode, TcpStream, bool), End> {
    let mut failure = End::NoServer;
    for node in region.nodes.iter().filter(|node| !node.stun_only) {
        let plain = plain && node.derp_port != HTTPS_PORT;
        let port = match node.derp_port {
            0 if plain => HTTP_PORT,
            0 => HTTPS_PORT,
            port => port,
        };
        match timeout(CONNECT_ONE, connect_node(node, port)).await {
            Ok(Ok(tcp)) => return Ok((node, tcp, plain)),
            Ok(Err(error)) => failure = error.into(),
            Err(_) => failure = End::Slow,
        }
    }
    Err(failure)
}

async fn connect_node(node: &DerpNode, port: u16) -> Result<TcpStream, dial::Error> {
    let host = &node.host_name;
    let given = [&node.ipv4, &node.ipv6].map(|ip| ip.parse::<IpAddr>());
    let mut addresses: Vec<SocketAddr> = given
        .into_iter()
        .flatten()
        .map(|ip| SocketAddr::new(ip, port))
        .collect();
    if addresses.is_empty() {
        // Anything else than an address, such as `none`, forbids the family.
        addresses = lookup_host((&**host, port))
            .await
            .map_err(|source| dial::Error::Lookup {
                host: host.clone(),
                source,
            })?
            .filter(|a| if a.is_ipv4() { &node.ipv4 } else { &node.ipv6 }.is_empty())
            .collect();
    }
    dial::race(addresses)
        .await
        .map_err(|source| dial::Error::Connect {
            host: host.clone(),
            port,
            source,
        })
}

/// Begins a certificate name that is a hash of the certificate instead.
const PIN: &str = "sha256-raw:";

/// TLS as a server of the map wants to be checked.
fn tls_for(node: &DerpNode, usual: &Arc<ClientConfig>) -> Result<Arc<ClientConfig>, End> {
    let pin = match node.cert_name.strip_prefix(PIN) {
        Some(hex) => Some(parse_pin(hex).ok_or_else(|| End::Pin(node.cert_name.clone()))?),
        None if node.insecure_for_tests => None,
        None => return Ok(usual.clone()),
    };
    let mut config = ClientConfig::clone(usual);
    let provider = usual.crypto_provider().clone();
    config
        .dangerous()
        .set_certificate_verifier(Arc::new(Pinned { pin, provider }));
    Ok(Arc::new(config))
}

fn parse_pin(hex: &str) -> Option<[u8; 32]> {
    let mut pin = [0; 32];
    if hex.len() != 64 {
        return None;
    }
    for (byte, digits) in pin.iter_mut().zip(hex.as_bytes().chunks(2)) {
        let [high, low] = digits else { return None };
        let digit = |c: u8| char::from(c).to_digit(16);
        // Two hexadecimal digits always fit.
        *byte = (digit(*high)? << 4 | digit(*low)?) as u8;
    }
    Some(pin)
}

/// Accepts the one certificate of a hash, or any where the map says that this is a test.
#[derive(Debug)]
struct Pinned {
    pin: Option<[u8; 32]>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _others: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let hash = ring::digest::digest(&ring::digest::SHA256, certificate);
        match &self.pin {
            Some(pin) if hash.as_ref() != pin => Err(rustls::Error::General(
                "the certificate is not the one of the map".into(),
            )),
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use tailnode_control_server::{Config, DERP_REGION, KeySpec, Server};
    use tempfile::TempDir;

    use super::*;
    use crate::{auth_key::AuthKey, control, state::Keys};

    /// Waiting for longer is a failure of the test, not of the relay.
    const PATIENCE: Duration = Duration::from_secs(30);

    /// The map of one region at the server's own address.
    fn map(server: &Server) -> DerpMap {
        let address = server.url().socket_addrs(|| None).unwrap()[0];
        let node = DerpNode {
            host_name: address.ip().to_string(),
            ipv4: address.ip().to_string(),
            derp_port: address.port(),
            ..DerpNode::default()
        };
        let region = DerpRegion {
            region_id: DERP_REGION,
            nodes: vec![node],
            ..DerpRegion::default()
        };
        DerpMap {
            regions: [(DERP_REGION, region)].into(),
            ..DerpMap::default()
        }
    }

    struct Client {
        relays: Relays,
        key: NodePublicKey,
        incoming: mpsc::Receiver<Incoming>,
    }

    /// The key of a new member of the tailnet: the relay serves no others.
    async fn member(server: &Server) -> NodeKeyPair {
        let spec = KeySpec::default();
        let config = control::Config {
            login_server: server.url().clone(),
            auth_key: Some(AuthKey::parse(&server.create_key(spec).unwrap()).unwrap()),
            hostname: "member".into(),
            tags: Vec::new(),
            routes: Vec::new(),
            ephemeral: false,
            known: false,
            lock: crate::netmap::Lock::Off,
            tls: dial::tls_config(),
        };
        let keys = Keys::random();
        let (events_tx, mut events) = mpsc::channel(16);
        let _session = control::spawn(config, keys.clone(), events_tx);
        let joined =
            async { while !matches!(events.recv().await.unwrap(), control::Event::Map { .. }) {} };
        timeout(PATIENCE, joined).await.unwrap();
        keys.node
    }

    impl Client {
        fn new(key: NodeKeyPair) -> Self {
            let (incoming_tx, incoming) = mpsc::channel(1);
            let public = key.public;
            let relays = Relays::new(key, dial::tls_config(), true, incoming_tx);
            Self {
                relays,
                key: public,
                incoming,
            }
        }

        async fn at_home(server: &Server) -> Self {
            let client = Self::new(member(server).await);
            client.relays.set_map(map(server));
            client.relays.set_home(DERP_REGION);
            client
        }

        async fn receive(&mut self) -> Incoming {
            timeout(PATIENCE, self.incoming.recv())
                .await
                .unwrap()
                .unwrap()
        }

        /// Sends until something comes back: the other may not be connected yet.
        async fn reach(&self, other: &mut Self, packet: &'static [u8]) -> Incoming {
            let send = async {
                loop {
                    self.relays
                        .send(DERP_REGION, &other.key, Bytes::from_static(packet));
                    sleep(Duration::from_millis(50)).await;
                }
            };
            tokio::select! {
                incoming = other.incoming.recv() => incoming.unwrap(),
                () = send => unreachable!(),
                () = sleep(PATIENCE) => panic!("no packet came through"),
            }
        }
    }

    #[tokio::test]
    async fn packets_pass_both_ways() {
        let state = TempDir::new().unwrap();
        let server = Server::start(Config::new(state.path())).await.unwrap();
        let mut a = Client::at_home(&server).await;
        let mut b = Client::at_home(&server).await;
        let got = a.reach(&mut b, b"hello").await;
        assert_eq!(
            (got.region, got.from, &got.packet[..]),
            (DERP_REGION, a.key, &b"hello"[..])
        );
        assert!(a.relays.connected(DERP_REGION));
        // More than fits the receiver's channel and the socket: nothing is lost on our side.
        let packet = Bytes::from(vec![7; 1400]);
        for _ in 0..QUEUE / 2 {
            b.relays.send(DERP_REGION, &a.key, packet.clone());
        }
        for _ in 0..QUEUE / 2 {
            assert_eq!(a.receive().await.packet, packet);
        }
        assert_eq!(b.relays.dropped(), 0);
        assert_eq!(a.relays.nearest().await, Some(DERP_REGION));
    }

    #[tokio::test]
    async fn a_line_is_made_when_a_packet_needs_it() {
        let state = TempDir::new().unwrap();
        let server = Server::start(Config::new(state.path())).await.unwrap();
        let mut home = Client::at_home(&server).await;
        let visitor = Client::new(member(&server).await);
        visitor.relays.set_map(map(&server));
        assert!(!visitor.relays.connected(DERP_REGION));
        assert_eq!(visitor.reach(&mut home, b"knock").await.from, visitor.key);
        assert!(visitor.relays.connected(DERP_REGION));
        visitor.relays.set_map(DerpMap::default());
        assert!(!visitor.relays.connected(DERP_REGION));
    }

    #[tokio::test]
    async fn a_relay_that_comes_back_is_found() {
        let state = TempDir::new().unwrap();
        let server = Server::start(Config::new(state.path())).await.unwrap();
        let a = Client::at_home(&server).await;
        let mut b = Client::at_home(&server).await;
        a.reach(&mut b, b"before").await;
        let listen = server.url().socket_addrs(|| None).unwrap()[0];
        server.shutdown().await;
        while b.incoming.try_recv().is_ok() {}
        let again = Config {
            listen,
            ..Config::new(state.path())
        };
        let _server = Server::start(again).await.unwrap();
        assert_eq!(a.reach(&mut b, b"after").await.from, a.key);
    }

    #[tokio::test]
    async fn a_line_from_an_address_that_is_gone_is_made_anew() {
        let state = TempDir::new().unwrap();
        let server = Server::start(Config::new(state.path())).await.unwrap();
        let mut a = Client::at_home(&server).await;
        let mut b = Client::at_home(&server).await;
        a.reach(&mut b, b"x").await;
        let line = |client: &Client| {
            let state = client.relays.shared.state();
            state.lines[&DERP_REGION].standing.clone()
        };
        let before = line(&a);
        a.relays.set_addresses(&[]);
        assert!(before.same_channel(&line(&a)), "loopback stays");
        let (_gone, standing) = watch::channel(Standing {
            local: Some(IpAddr::from([192, 0, 2, 1])),
            ..Standing::default()
        });
        let before = standing.clone();
        if let Some(line) = a.relays.shared.state().lines.get_mut(&DERP_REGION) {
            line.standing = standing;
        }
        a.relays.set_addresses(&[IpAddr::from([192, 0, 2, 1])]);
        assert!(before.same_channel(&line(&a)));
        a.relays.set_addresses(&[IpAddr::from([192, 0, 2, 2])]);
        assert!(!before.same_channel(&line(&a)));
        b.reach(&mut a, b"y").await;
    }

    #[tokio::test]
    async fn a_new_key_is_a_new_name() {
        let state = TempDir::new().unwrap();
        let server = Server::start(Config::new(state.path())).await.unwrap();
        let mut a = Client::at_home(&server).await;
        let mut b = Client::at_home(&server).await;
        a.reach(&mut b, b"x").await;
        let key = member(&server).await;
        a.key = key.public;
        a.relays.set_key(key);
        b.reach(&mut a, b"y").await;
    }

    #[tokio::test]
    async fn what_cannot_be_sent_is_counted() {
        let client = Client::new(NodeKeyPair::random());
        client.relays.send(3, &client.key, Bytes::from_static(b"x"));
        assert_eq!(client.relays.dropped(), 1);
        // A relay that nobody is: packets wait in a queue that is bounded.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let node = DerpNode {
            host_name: "127.0.0.1".into(),
            ipv4: "127.0.0.1".into(),
            derp_port: listener.local_addr().unwrap().port(),
            ..DerpNode::default()
        };
        let region = DerpRegion {
            nodes: vec![node],
            ..DerpRegion::default()
        };
        let map = DerpMap {
            regions: [(3, region)].into(),
            ..DerpMap::default()
        };
        client.relays.set_map(map);
        for _ in 0..2 * QUEUE {
            client.relays.send(3, &client.key, Bytes::from_static(b"x"));
        }
        assert_eq!(client.relays.dropped(), 1 + QUEUE as u64);
        client
            .relays
            .send(3, &client.key, vec![0; wire::MAX_PACKET + 1].into());
        assert_eq!(client.relays.dropped(), 2 + QUEUE as u64);
    }

    #[test]
    fn pins_are_hashes() {
        assert_eq!(parse_pin(&"0a".repeat(32)), Some([10; 32]));
        for wrong in [
            "",
            "0a",
            &"xx".repeat(32),
            &"+1".repeat(32),
            &"é".repeat(32),
        ] {
            assert_eq!(parse_pin(wrong), None, "{wrong}");
        }
    }
}
