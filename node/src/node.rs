//! A running node: the task that owns its router, sockets and map, and the handle to it.

use std::{
    cell::RefCell,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use tailnode_wire::{
    keys::{DiscoPublicKey, ExportableKey},
    stun,
    tailcfg::{DerpMap, DerpNode, EndpointType, MapResponse, NetInfo, RegionId},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::sleep_until,
};
use tracing::{Instrument, debug, info, warn};
use url::Url;

pub use crate::control::Secret;
use crate::{
    addresses::{Addresses, Watch},
    control, derp,
    device::{Closed, Device, PACKET_ROOM},
    dial,
    dns::{Resolver, Upstreams, Zone},
    netcheck::{Netcheck, Report, Target},
    netmap::{Changes, Netmap},
    packet::Packet,
    router::{Out, Router, Taken, To},
    segment::{Crossing, Membership, Segment},
    state::{self, Store},
    status::{Login, Status},
    udp::{Batch, Udp},
};

/// Packets handled from one source before the others have their turn.
const TURN: usize = 64;
/// Bytes collected before they are sent, so that one turn's memory stays bounded.
const FLUSH: usize = 512 * 1024;
/// How often endpoints are looked up while packets flow; NATs forget after 30 s (RFC 4787).
const CHECK_BUSY: Duration = Duration::from_secs(25);
/// How often at most when a path is lost: the NAT may have changed.
const CHECK_LOST: Duration = Duration::from_secs(3);
/// How often while they do not.
const CHECK_IDLE: Duration = Duration::from_secs(120);
/// How soon the answers of a round are looked at.
const CHECK_POLL: Duration = Duration::from_millis(200);
/// How soon after a change of the host's addresses they are looked at: changes come in a row.
const SETTLE: Duration = Duration::from_millis(100);
/// How soon after a packet the timers of a session that it may have begun are looked at.
const FIRST_TICK: Duration = Duration::from_millis(50);
/// How long a live map is waited for where a saved one would do.
const PREFER_LIVE: Duration = Duration::from_secs(2);
/// How long a logout may take.
const LOGOUT: Duration = Duration::from_secs(4);
/// At most how often the map is written to disk.
const SAVE_EVERY: Duration = Duration::from_secs(5);

/// What a node needs to be.
#[derive(Debug)]
pub struct Config {
    /// Where its keys and last map are kept; made if it does not exist, mode 0700.
    pub state_dir: PathBuf,
    /// The control server.
    pub login_server: Url,
    /// A key to join with; a known node needs none.
    pub auth_key: Option<Secret>,
    /// The name to ask for.
    pub hostname: String,
    /// Tags to ask for, `tag:` included.
    pub tags: Vec<String>,
    /// Ask to be forgotten when gone.
    pub ephemeral: bool,
    /// Suffixes of names that another resolver of the container knows: not asked of the host's.
    pub names_elsewhere: Vec<String>,
    /// A non-blocking TUN device with `IFF_NO_PI` and `IFF_VNET_HDR`, in any namespace.
    pub tun: OwnedFd,
}

/// Who a node is in its tailnet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Its MagicDNS name without the trailing dot.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Domains to complete short names with.
    pub search_domains: Vec<String>,
}

/// Why a node cannot start or is not ready.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its state cannot be used.
    #[error(transparent)]
    State(#[from] state::Error),
    /// The kernel refused a socket or the device.
    #[error("cannot {doing}: {source}")]
    Kernel {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The control server refused it for good.
    #[error("the control server {server} refused the node: {reason}")]
    Refused {
        /// The control server's URL.
        server: Url,
        /// Its words.
        reason: String,
    },
    /// A person must log in first.
    #[error("log in first: open {url} and start the container again")]
    NeedsLogin {
        /// The page.
        url: String,
    },
    /// Its key expired.
    #[error(
        "the node's key has expired: give it an auth key, or extend it in the admin console of {server}"
    )]
    Expired {
        /// The control server's URL.
        server: Url,
    },
    /// An administrator must approve it.
    #[error(
        "the node waits for approval: approve it in the admin console of {server} and start the container again"
    )]
    NeedsApproval {
        /// The control server's URL.
        server: Url,
    },
    /// The control server did not answer, and there is no saved map.
    #[error("the control server {server} did not let the node join within {seconds} s: {reason}")]
    Unreachable {
        /// The control server's URL.
        server: Url,
        /// How long it was tried.
        seconds: u64,
        /// The last failure.
        reason: String,
    },
    /// It is no longer running.
    #[error("the node has stopped")]
    Stopped,
}

/// A handle to a running node. Cheap to clone; the node runs until [`Node::stop`], or until the
/// last handle is dropped.
#[derive(Clone)]
pub struct Node {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
}

struct Shared {
    server: Url,
    hostname: String,
    identity: watch::Receiver<Known>,
    login: watch::Receiver<Login>,
    routes: watch::Receiver<Vec<IpNet>>,
    zone: Zone,
}

/// What is known of the identity, and from where.
#[derive(Clone, Debug, Default)]
struct Known {
    identity: Option<Identity>,
    live: bool,
}

enum Command {
    Status(oneshot::Sender<Status>),
    Siblings(Vec<Zone>),
    Join(Segment, IpNet),
    Stop {
        logout: bool,
        done: oneshot::Sender<()>,
    },
}

thread_local! {
    /// Buffers of the thread, shared by all nodes that it runs: none holds them across an await.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

struct Scratch {
    packet: Vec<u8>,
    batch: Batch,
    out: Out,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            packet: vec![0; PACKET_ROOM],
            batch: Batch::default(),
            out: Out::default(),
        }
    }
}

impl Node {
    /// Starts a node. Returns once its state and sockets are open, without waiting for the network.
    pub async fn start(config: Config) -> Result<Self, Error> {
        let kernel = |doing| move |source| Error::Kernel { doing, source };
        let store = Store::open(&config.state_dir, &config.login_server)?;
        let keys = store.keys()?;
        let saved = store.load_netmap();
        let device = Device::new(config.tun).map_err(kernel("use the TUN device"))?;
        let udp = Udp::open(usual_port(&keys.disco.public)).map_err(kernel("open a UDP socket"))?;
        let watch = Watch::open().map_err(kernel("watch the host's addresses"))?;

        let tls = dial::tls_config();
        let (events_tx, events) = mpsc::channel(16);
        let (incoming_tx, incoming) = mpsc::channel(256);
        let (replies_tx, replies) = mpsc::channel(64);
        let (commands, commands_rx) = mpsc::channel(16);
        let (identity_tx, identity) = watch::channel(Known::default());
        let (login_tx, login) = watch::channel(Login::Starting);
        let (routes_tx, routes) = watch::channel(Vec::new());

        let plain_http = config.login_server.scheme() == "http";
        let relays = derp::Relays::new(keys.node.clone(), tls.clone(), plain_http, incoming_tx);
        let router = Router::new(&keys);
        let session = control::spawn(
            control::Config {
                login_server: config.login_server.clone(),
                auth_key: config.auth_key,
                hostname: config.hostname.clone(),
                tags: config.tags,
                ephemeral: config.ephemeral,
                tls,
            },
            keys,
            events_tx,
        );
        let zone = Zone::default();
        let resolver = Resolver::new(
            zone.clone(),
            replies_tx,
            Upstreams::host().except(&config.names_elsewhere),
        );
        let (questions_tx, questions) = mpsc::channel(64);
        resolver.ask_peers(questions_tx);
        let (targets_tx, targets) = mpsc::channel(1);
        let (nearest_tx, nearest) = mpsc::channel(1);

        let mut task = Task {
            hostname: config.hostname.clone(),
            server: config.login_server.clone(),
            device,
            udp,
            watch,
            router,
            netcheck: Netcheck::default(),
            report: Report::default(),
            next_check: Instant::now(),
            checked_at: None,
            next_tick: None,
            targets_tx,
            nearest_tx,
            asked_nearest: false,
            local: Addresses::default(),
            relays,
            session,
            ephemeral: config.ephemeral,
            store: Arc::new(store),
            saving: None,
            unsaved: None,
            netmap: Netmap::default(),
            resolver,
            zone: zone.clone(),
            known: identity_tx,
            login: login_tx,
            routes: routes_tx,
            rx_bytes: 0,
            tx_bytes: 0,
            segment: None,
        };
        if let Some(saved) = saved {
            task.netmap = saved;
            task.take_changes(&Changes::everything(), false);
        }
        let span = tracing::info_span!("node", hostname = %config.hostname);
        let inputs = Inputs {
            events,
            incoming,
            replies,
            questions,
            commands: commands_rx,
            targets,
            nearest,
            crossings: None,
        };
        tokio::spawn(task.run(inputs).instrument(span));
        Ok(Self {
            commands,
            shared: Arc::new(Shared {
                server: config.login_server,
                hostname: config.hostname,
                identity,
                login,
                routes,
                zone,
            }),
        })
    }

    /// Waits until the node knows who it is: from the control server, or from its last map where
    /// the control server does not answer.
    pub async fn ready(&self, timeout: Duration) -> Result<Identity, Error> {
        let deadline = tokio::time::Instant::now() + timeout;
        let prefer_live = tokio::time::Instant::now() + PREFER_LIVE.min(timeout);
        let mut identity = self.shared.identity.clone();
        let mut login = self.shared.login.clone();
        let server = || self.shared.server.clone();
        loop {
            let known = identity.borrow_and_update().clone();
            let state = login.borrow_and_update().clone();
            match &state {
                Login::NeedsApproval => return Err(Error::NeedsApproval { server: server() }),
                Login::Stopped => return Err(Error::Stopped),
                _ if known.live && known.identity.is_some() => {
                    return known.identity.ok_or(Error::Stopped);
                }
                Login::Refused { error } => {
                    return Err(Error::Refused {
                        server: server(),
                        reason: error.clone(),
                    });
                }
                Login::NeedsLogin { url } => return Err(Error::NeedsLogin { url: url.clone() }),
                Login::Expired => return Err(Error::Expired { server: server() }),
                Login::Offline { .. } if known.identity.is_some() => {
                    return known.identity.ok_or(Error::Stopped);
                }
                Login::Starting | Login::Running | Login::Offline { .. } => {}
            }
            let until = if known.identity.is_some() {
                prefer_live
            } else {
                deadline
            };
            tokio::select! {
                changed = identity.changed() => changed.map_err(|_| Error::Stopped)?,
                changed = login.changed() => changed.map_err(|_| Error::Stopped)?,
                () = sleep_until(until) => {
                    return known.identity.ok_or_else(|| Error::Unreachable {
                        server: server(),
                        seconds: timeout.as_secs(),
                        reason: match state {
                            Login::Offline { error } => error,
                            _ => "it does not answer".to_owned(),
                        },
                    });
                }
            }
        }
    }

    /// The node at this moment.
    pub async fn status(&self) -> Status {
        let (reply, answer) = oneshot::channel();
        if self.commands.send(Command::Status(reply)).await.is_ok()
            && let Ok(status) = answer.await
        {
            return status;
        }
        let identity = self
            .shared
            .identity
            .borrow()
            .identity
            .clone()
            .unwrap_or_default();
        Status {
            hostname: self.shared.hostname.clone(),
            name: identity.name,
            addresses: identity.addresses,
            login: Login::Stopped,
            login_server: self.shared.server.to_string(),
            home_relay: String::new(),
            health: Vec::new(),
            peers: Vec::new(),
            rx_bytes: 0,
            tx_bytes: 0,
        }
    }

    /// Resolves when the node runs no more: stopped, or its device's namespace is gone.
    pub async fn gone(&self) {
        self.commands.closed().await;
    }

    /// Stops the node, and with `logout` tells the control server to forget it. Idempotent; takes
    /// at most a few seconds, and those only for the logout.
    pub async fn stop(&self, logout: bool) {
        let (done, finished) = oneshot::channel();
        if self
            .commands
            .send(Command::Stop { logout, done })
            .await
            .is_ok()
        {
            // An error says that the task ended first, which is what was asked for.
            let _ = finished.await;
        }
    }

    /// The names of the node's tailnet.
    pub fn zone(&self) -> Zone {
        self.shared.zone.clone()
    }

    /// Answers the names of these tailnets too: those that the same container is in.
    pub async fn set_siblings(&self, zones: Vec<Zone>) {
        // A stopped node answers no names at all.
        let _ = self.commands.send(Command::Siblings(zones)).await;
    }

    /// Takes an address in a network of this host, where it reaches the other members without the
    /// tailnet but under its policy. IPv4 only; the node must be ready.
    pub async fn join(&self, segment: Segment, address: IpNet) {
        // A stopped node is a member of nothing.
        let _ = self.commands.send(Command::Join(segment, address)).await;
    }

    /// The addresses of the peers, as they change.
    pub fn routes(&self) -> watch::Receiver<Vec<IpNet>> {
        self.shared.routes.clone()
    }
}

struct Task {
    hostname: String,
    server: Url,
    device: Device,
    udp: Udp,
    watch: Watch,
    router: Router,
    netcheck: Netcheck,
    report: Report,
    next_check: Instant,
    checked_at: Option<Instant>,
    next_tick: Option<Instant>,
    targets_tx: mpsc::Sender<Vec<Target>>,
    /// Where the nearest relay is told, once it was asked for because STUN did not answer.
    nearest_tx: mpsc::Sender<RegionId>,
    asked_nearest: bool,
    /// The host's addresses when they were last looked at.
    local: Addresses,
    relays: derp::Relays,
    session: control::Handle,
    ephemeral: bool,
    store: Arc<Store>,
    /// The writing of a map that is under way.
    saving: Option<JoinHandle<()>>,
    /// Since when the map on disk is older than ours.
    unsaved: Option<Instant>,
    netmap: Netmap,
    resolver: Resolver,
    zone: Zone,
    known: watch::Sender<Known>,
    login: watch::Sender<Login>,
    routes: watch::Sender<Vec<IpNet>>,
    rx_bytes: u64,
    tx_bytes: u64,
    segment: Option<Membership>,
}

struct Inputs {
    events: mpsc::Receiver<control::Event>,
    incoming: mpsc::Receiver<derp::Incoming>,
    replies: mpsc::Receiver<Vec<u8>>,
    questions: mpsc::Receiver<Vec<u8>>,
    commands: mpsc::Receiver<Command>,
    targets: mpsc::Receiver<Vec<Target>>,
    nearest: mpsc::Receiver<RegionId>,
    crossings: Option<mpsc::Receiver<Crossing>>,
}

impl Task {
    async fn run(mut self, mut inputs: Inputs) {
        let mut stopped = None;
        let (why, logout) = loop {
            let deadline = self.deadline().into();
            let turn = tokio::select! {
                ready = self.device.readable() => match ready {
                    Ok(()) => self.serve_tun(),
                    Err(error) => Err(Closed::Failed(error)),
                },
                ready = self.udp.readable() => match ready {
                    Ok(()) => self.serve_udp(),
                    Err(error) => Err(Closed::Failed(error)),
                },
                changed = self.watch.changed() => {
                    self.next_check = self.next_check.min(Instant::now() + SETTLE);
                    changed.map_err(Closed::Failed)
                }
                Some(first) = inputs.incoming.recv() => self.serve_relays(first, &mut inputs.incoming),
                Some(packet) = inputs.replies.recv() => self.device.send(&packet),
                Some(question) = inputs.questions.recv() => self.serve_resolver(&question),
                Some(crossing) = next_crossing(&mut inputs.crossings) => self.serve_segment(crossing),
                Some(event) = inputs.events.recv() => {
                    self.control(event);
                    Ok(())
                }
                Some(targets) = inputs.targets.recv() => {
                    self.netcheck.set_targets(targets);
                    self.checked_at = None;
                    self.asked_nearest = false;
                    self.next_check = Instant::now();
                    Ok(())
                }
                Some(region) = inputs.nearest.recv() => {
                    self.netcheck.set_fallback(region);
                    self.next_check = Instant::now();
                    Ok(())
                }
                command = inputs.commands.recv() => match command {
                    None => break (None, false),
                    Some(Command::Status(reply)) => {
                        // Whoever asked may have stopped waiting.
                        let _ = reply.send(self.status());
                        Ok(())
                    }
                    Some(Command::Join(segment, address)) => {
                        inputs.crossings = self.join(segment, address);
                        Ok(())
                    }
                    Some(Command::Siblings(zones)) => {
                        self.resolver.set_siblings(zones);
                        Ok(())
                    }
                    Some(Command::Stop { logout, done }) => {
                        stopped = Some(done);
                        break (None, logout);
                    }
                },
                () = sleep_until(deadline) => self.tick(),
            };
            if let Err(closed) = turn {
                // Nobody will ask for the logout of a node whose container just died.
                break (Some(closed), self.ephemeral);
            }
        };
        match why {
            Some(Closed::NamespaceGone) => info!("the container is gone"),
            Some(error) => warn!(%error, "the node ends"),
            None => debug!("stopped"),
        }
        self.save();
        let Self {
            device,
            udp,
            relays,
            session,
            saving,
            login,
            segment,
            store,
            ..
        } = self;
        // First what others see: the logout may take seconds.
        drop((device, udp, relays, segment));
        if logout {
            session.logout(LOGOUT).await;
        }
        if let Some(saving) = saving {
            // It logs its own failures.
            let _ = saving.await;
        }
        drop(store);
        login.send_replace(Login::Stopped);
        if let Some(done) = stopped {
            // Whoever asked may have stopped waiting.
            let _ = done.send(());
        }
    }

    fn serve_tun(&mut self) -> Result<(), Closed> {
        let now = Instant::now();
        self.stir(now);
        SCRATCH.with_borrow_mut(|Scratch { packet, out, .. }| {
            for _ in 0..TURN {
                let Some(packet) = self.device.receive(packet)? else {
                    break;
                };
                if self.cross(packet, now) {
                    continue;
                }
                match self.router.on_tun(packet, now, out) {
                    Taken::Sent => self.tx_bytes += packet.len() as u64,
                    Taken::Dropped => {}
                    Taken::ForResolver => self.resolver.handle(packet),
                }
                if out.len() > FLUSH {
                    self.flush(out)?;
                }
            }
            self.flush(out)
        })
    }

    fn serve_udp(&mut self) -> Result<(), Closed> {
        let now = Instant::now();
        SCRATCH.with_borrow_mut(|Scratch { batch, out, .. }| {
            for _ in 0..TURN / quinn_udp::BATCH_SIZE {
                match self.udp.receive(batch) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // A pending ICMP error of some address: the datagram it is about is lost.
                    Err(error) => {
                        debug!(%error, "UDP reports an error");
                        continue;
                    }
                }
                for (from, datagram) in batch.datagrams() {
                    if stun::is_stun(datagram) {
                        if self.netcheck.answer(datagram, now) && !self.netcheck.waiting(now) {
                            self.next_check = now;
                        }
                    } else {
                        self.next_tick.get_or_insert(now + FIRST_TICK);
                        self.router.on_udp(from, datagram, now, out);
                    }
                    if out.len() > FLUSH {
                        self.flush(out)?;
                    }
                }
            }
            self.flush(out)
        })
    }

    fn serve_relays(
        &mut self,
        first: derp::Incoming,
        more: &mut mpsc::Receiver<derp::Incoming>,
    ) -> Result<(), Closed> {
        let now = Instant::now();
        self.stir(now);
        SCRATCH.with_borrow_mut(|Scratch { out, .. }| {
            let mut next = Some(first);
            let mut turn = 0;
            while let Some(incoming) = next {
                self.router
                    .on_relay(incoming.region, &incoming.from, &incoming.packet, now, out);
                turn += 1;
                next = if turn < TURN && out.len() < FLUSH {
                    more.try_recv().ok()
                } else {
                    None
                };
            }
            self.flush(out)
        })
    }

    /// Takes a packet for, or an answer within, the segment. Returns whether it was one.
    fn cross(&mut self, packet: &[u8], now: Instant) -> bool {
        let Some(membership) = &self.segment else {
            return false;
        };
        let Ok(parsed) = Packet::parse(packet) else {
            return false;
        };
        if !membership.concerns(parsed.src(), parsed.dst()) {
            return false;
        }
        if let Some((src, dst)) = membership.stands_for(parsed.src(), parsed.dst())
            && self.router.may_leave(packet, src, dst, now)
        {
            self.tx_bytes += packet.len() as u64;
            membership.send(Crossing {
                packet: packet.to_vec(),
                src,
                dst,
            });
        }
        true
    }

    /// A question of the resolver's to a server that is a peer.
    fn serve_resolver(&mut self, question: &[u8]) -> Result<(), Closed> {
        let now = Instant::now();
        self.stir(now);
        SCRATCH.with_borrow_mut(|Scratch { out, .. }| {
            self.router.on_tun(question, now, out);
            self.flush(out)
        })
    }

    fn serve_segment(&mut self, crossing: Crossing) -> Result<(), Closed> {
        let Crossing { packet, src, dst } = crossing;
        if self.router.may_enter(&packet, src, dst, Instant::now()) {
            self.rx_bytes += packet.len() as u64;
            self.device.send(&packet)?;
        }
        Ok(())
    }

    fn join(&mut self, segment: Segment, address: IpNet) -> Option<mpsc::Receiver<Crossing>> {
        let own = self
            .netmap
            .myself
            .addresses
            .iter()
            .map(IpNet::addr)
            .find(IpAddr::is_ipv4);
        let Some(tailnet) = own else {
            warn!(%address, "no IPv4 address in the tailnet, so none in the host's network");
            return None;
        };
        let (membership, crossings) = segment.join(address, tailnet);
        self.segment = Some(membership);
        Some(crossings)
    }

    /// Sends what the router put out: datagrams to one address as one train.
    fn flush(&mut self, out: &mut Out) -> Result<(), Closed> {
        let mut failed: Vec<SocketAddr> = Vec::new();
        for (to, bytes, segment) in out.trains(|segment| self.udp.train(segment)) {
            match to {
                To::Tun if self.resolver.take_answer(bytes) => {}
                To::Tun => {
                    self.rx_bytes += bytes.len() as u64;
                    self.device.send(bytes)?;
                }
                To::Relay(region, key) => {
                    self.relays
                        .send(region, &key, bytes::Bytes::copy_from_slice(bytes));
                }
                To::Address(address) => {
                    if let Err(error) = self.udp.send(address, bytes, segment) {
                        debug!(%address, %error, "cannot send");
                        failed.push(address);
                    }
                }
            }
        }
        out.clear();
        for address in failed {
            self.router.unreachable(address);
        }
        Ok(())
    }

    /// A packet may begin a session, whose timers must be kept from then on.
    fn stir(&mut self, now: Instant) {
        self.next_tick.get_or_insert(now + FIRST_TICK);
    }

    fn deadline(&self) -> Instant {
        let mut deadline = self.next_check;
        if let Some(tick) = self.next_tick {
            deadline = deadline.min(tick);
        }
        if let Some(since) = self.unsaved {
            deadline = deadline.min(since + SAVE_EVERY);
        }
        deadline
    }

    fn tick(&mut self) -> Result<(), Closed> {
        let now = Instant::now();
        if self.unsaved.is_some_and(|since| now >= since + SAVE_EVERY) {
            self.save();
        }
        if now >= self.next_check {
            self.check(now);
        }
        if self.next_tick.is_some_and(|at| now >= at) {
            SCRATCH.with_borrow_mut(|Scratch { out, .. }| {
                self.next_tick = self.router.tick(now, out);
                self.flush(out)
            })?;
            // Peers are about to look for a path: stale endpoints would not open our NAT.
            let stale = |age| self.checked_at.is_none_or(|at| now >= at + age);
            if self.router.has_lost_a_path() && stale(CHECK_LOST) {
                self.checked_at = None;
                self.next_check = now;
            } else if self.next_tick.is_some() && stale(CHECK_BUSY) {
                self.next_check = now;
            }
        }
        Ok(())
    }

    /// Takes stock: of peers' keys that expired, and of our network, by asking the STUN servers or
    /// looking at what they answered.
    fn check(&mut self, now: Instant) {
        let expired = self.netmap.expire(chrono::Utc::now());
        if !expired.is_empty() {
            let changes = Changes {
                peers: expired,
                ..Changes::default()
            };
            let live = self.known.borrow().live;
            self.take_changes(&changes, live);
        }
        let local = Addresses::look();
        if self.local != local {
            if !self.local.all.is_empty() {
                info!("the host's addresses changed");
            }
            if local.is_a_move_from(&self.local) {
                self.netcheck.reset();
                self.router.reset_paths();
                self.relays.set_addresses(&local.all);
                self.asked_nearest = false;
            }
            if local.goes_another_way_than(&self.local) {
                self.session.moved();
            }
            self.checked_at = None;
            self.local = local;
        }
        let busy = self.next_tick.is_some();
        let every = if busy { CHECK_BUSY } else { CHECK_IDLE };
        if self.checked_at.is_none_or(|at| now >= at + every) {
            self.checked_at = Some(now);
            for (address, request) in self.netcheck.start(now) {
                if let Err(error) = self.udp.send(address, &request, request.len()) {
                    debug!(%address, %error, "cannot ask the STUN server");
                }
            }
        }
        self.next_check = if self.netcheck.waiting(now) {
            now + CHECK_POLL
        } else {
            now + every
        };
        let report = self.netcheck.report(now);
        if report.latency.is_empty() && !self.netcheck.waiting(now) && !self.asked_nearest {
            self.asked_nearest = true;
            let (nearest, answer) = (self.relays.nearest(), self.nearest_tx.clone());
            tokio::spawn(async move {
                if let Some(region) = nearest.await {
                    // The node may have stopped meanwhile.
                    let _ = answer.send(region).await;
                }
            });
        }
        if report.home != self.report.home {
            info!(region = report.home, "home relay");
            self.relays.set_home(report.home);
        }
        self.report = report;
        self.advertise();
    }

    /// Tells the control server and the router where we can be reached.
    fn advertise(&mut self) {
        let port = match self.udp.port() {
            Ok(port) => port,
            Err(error) => {
                warn!(%error, "cannot tell the port of the UDP socket");
                return;
            }
        };
        let mut endpoints: Vec<(SocketAddr, EndpointType)> = self
            .report
            .public
            .iter()
            .map(|address| (*address, EndpointType::Stun))
            .collect();
        for ip in &self.local.all {
            let endpoint = SocketAddr::new(*ip, port);
            if endpoints.iter().all(|(known, _)| *known != endpoint) {
                endpoints.push((endpoint, EndpointType::Local));
            }
        }
        endpoints.sort_by_key(|(address, _)| *address);
        self.router
            .set_endpoints(endpoints.iter().map(|(address, _)| *address).collect());
        let net_info = NetInfo {
            preferred_derp: self.report.home,
            working_udp: Some(!self.report.public.is_empty()),
            mapping_varies_by_dest_ip: self.report.mapping_varies,
            derp_latency: self
                .report
                .latency
                .iter()
                .map(|(region, latency)| (format!("{region}-v4"), latency.as_secs_f64()))
                .collect(),
            ..NetInfo::default()
        };
        self.session.advertise(control::Advertised {
            endpoints,
            net_info,
        });
    }

    fn control(&mut self, event: control::Event) {
        match event {
            control::Event::Login(login) => {
                info!(?login, "control");
                self.login.send_replace(login);
            }
            control::Event::Map { response, first } => self.map(*response, first),
            control::Event::KeysRotated(keys) => {
                if let Err(error) = self.store.save_keys(&keys) {
                    warn!(%error, "cannot keep the new node key");
                }
                self.router.set_keys(&keys);
                self.relays.set_key(keys.node.clone());
            }
        }
    }

    fn map(&mut self, response: MapResponse, first: bool) {
        let now = chrono::Utc::now();
        let changes = if first {
            self.netmap.restart(response, now)
        } else {
            self.netmap.apply(response, now)
        };
        self.take_changes(&changes, true);
        self.unsaved.get_or_insert_with(Instant::now);
    }

    fn take_changes(&mut self, changes: &Changes, live: bool) {
        let now = Instant::now();
        self.router.update(&self.netmap, changes, now);
        // Peers may be waited for that can be reached now.
        self.next_tick = Some(now);
        if changes.derp {
            self.relays.set_map(self.netmap.derp_map.clone());
            tokio::spawn(stun_targets(
                self.netmap.derp_map.clone(),
                self.targets_tx.clone(),
            ));
        }
        if changes.dns || changes.myself || changes.all_peers {
            self.zone.set(
                &self.netmap.myself,
                self.netmap.peers.values(),
                &self.netmap.dns,
            );
        } else {
            for id in &changes.peers {
                self.zone.update(*id, self.netmap.peers.get(id));
            }
        }
        if changes.all_peers || !changes.peers.is_empty() {
            let routes = self
                .netmap
                .peers
                .values()
                .flat_map(|peer| peer.addresses.clone())
                .collect();
            self.routes.send_if_modified(|known| {
                let changed = *known != routes;
                *known = routes;
                changed
            });
        }
        let identity = self.identity();
        if identity.addresses.is_empty() {
            return;
        }
        self.known.send_if_modified(|known| {
            let changed = known.identity.as_ref() != Some(&identity) || known.live != live;
            *known = Known {
                identity: Some(identity),
                live,
            };
            changed
        });
    }

    /// Writes the map to disk, off this thread: the disk may take its time.
    fn save(&mut self) {
        if self.unsaved.take().is_none() {
            return;
        }
        let (store, netmap, before) = (self.store.clone(), self.netmap.clone(), self.saving.take());
        self.saving = Some(tokio::spawn(async move {
            // One after the other, so that the newest map is the one that stays.
            if let Some(before) = before {
                let _ = before.await;
            }
            let saved = tokio::task::spawn_blocking(move || store.save_netmap(&netmap)).await;
            if let Ok(Err(error)) = saved {
                warn!(%error, "cannot keep the map: without it the node cannot start while the control server is away");
            }
        }));
    }

    /// Who we are by the map.
    fn identity(&self) -> Identity {
        let myself = &self.netmap.myself;
        Identity {
            name: myself.name.trim_end_matches('.').to_owned(),
            addresses: myself.addresses.iter().map(IpNet::addr).collect(),
            search_domains: self.netmap.dns.domains.clone(),
        }
    }

    fn status(&self) -> Status {
        let now = Instant::now();
        let region = |id| {
            self.netmap
                .derp_map
                .regions
                .get(&id)
                .map_or_else(|| format!("#{id}"), |region| region.region_code.clone())
        };
        let Identity {
            name, addresses, ..
        } = self.identity();
        Status {
            hostname: self.hostname.clone(),
            name,
            addresses,
            login: self.login.borrow().clone(),
            login_server: self.server.to_string(),
            home_relay: if self.report.home == 0 {
                String::new()
            } else {
                region(self.report.home)
            },
            health: self.netmap.health_lines(),
            peers: self.router.peers(now, region),
            rx_bytes: self.rx_bytes,
            tx_bytes: self.tx_bytes,
        }
    }
}

async fn next_crossing(crossings: &mut Option<mpsc::Receiver<Crossing>>) -> Option<Crossing> {
    crossings.as_mut()?.recv().await
}

/// The UDP port that a node tries first. It is always the same, so that peers reach the node where
/// they reached it before when its container, or the daemon, starts again. The range is below
/// Linux's own for outgoing connections (net.ipv4.ip_local_port_range).
fn usual_port(key: &DiscoPublicKey) -> u16 {
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 12_000;
    let export = key.export();
    let [a, b, ..] = export.as_bytes();
    FIRST + u16::from_be_bytes([*a, *b]) % COUNT
}

/// Looks up the STUN servers of a map. A server that cannot be looked up is left out.
async fn stun_targets(map: DerpMap, to: mpsc::Sender<Vec<Target>>) {
    let mut targets = Vec::new();
    for region in map.regions.values() {
        let eligible = !region.avoid && !region.no_measure_no_home;
        let port = |node: &DerpNode| match u16::try_from(node.stun_port) {
            Ok(0) => Some(3478),
            Ok(port) => Some(port),
            // Negative: it has none.
            Err(_) => None,
        };
        let servers = region
            .nodes
            .iter()
            .filter_map(|node| Some((node, port(node)?)));
        for (node, port) in servers.take(2) {
            let target = |ip| Target {
                region: region.region_id,
                address: SocketAddr::new(ip, port),
                eligible,
            };
            let given: Vec<IpAddr> = [&node.ipv4, &node.ipv6]
                .into_iter()
                .filter_map(|ip| ip.parse().ok())
                .collect();
            if given.is_empty() {
                match tokio::net::lookup_host((node.host_name.as_str(), port)).await {
                    Ok(found) => targets.extend(found.map(|address| target(address.ip()))),
                    Err(error) => {
                        debug!(host = %node.host_name, %error, "cannot look up the STUN server")
                    }
                }
            } else {
                targets.extend(given.into_iter().map(target));
            }
        }
    }
    // The node may have stopped meanwhile.
    let _ = to.send(targets).await;
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use tempfile::TempDir;
    use tokio::time::{sleep, timeout};

    use super::*;

    /// Waiting for longer is a failure of the test, not of the node.
    const PATIENCE: Duration = Duration::from_secs(30);

    /// A control server that takes connections and says nothing.
    fn silent_server() -> (TcpListener, Url) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        (listener, url.parse().unwrap())
    }

    /// A node whose device leads to the socket.
    async fn node(state: &TempDir, server: &Url) -> (Node, OwnedFd) {
        let (tun, container) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_NONBLOCK,
        )
        .unwrap();
        let config = Config {
            state_dir: state.path().to_owned(),
            login_server: server.clone(),
            auth_key: None,
            hostname: "a".into(),
            tags: Vec::new(),
            ephemeral: true,
            names_elsewhere: Vec::new(),
            tun,
        };
        (Node::start(config).await.unwrap(), container)
    }

    /// The port of the node that has the directory, once it has let go of it.
    fn left(state: &TempDir, server: &Url) -> Option<u16> {
        let store = Store::open(state.path(), server).ok()?;
        Some(usual_port(&store.keys().ok()?.disco.public))
    }

    #[tokio::test]
    async fn a_silent_control_server_delays_neither_ready_nor_stop() {
        let state = TempDir::new().unwrap();
        let (_listener, url) = silent_server();
        let (node, _container) = node(&state, &url).await;
        let ready = timeout(PATIENCE, node.ready(Duration::from_millis(200)));
        assert!(matches!(
            ready.await.unwrap(),
            Err(Error::Unreachable { .. })
        ));
        timeout(PATIENCE, node.stop(true)).await.unwrap();
        let port = left(&state, &url).expect("the directory is free");
        UdpSocket::bind(("127.0.0.1", port)).expect("and so is the port");
        timeout(PATIENCE, node.gone()).await.unwrap();
        timeout(PATIENCE, node.stop(true)).await.unwrap();
        assert_eq!(node.status().await.login, Login::Stopped);
        assert!(matches!(node.ready(PATIENCE).await, Err(Error::Stopped)));
    }

    #[tokio::test]
    async fn a_node_that_nobody_holds_ends() {
        let state = TempDir::new().unwrap();
        let (_listener, url) = silent_server();
        let (node, _container) = node(&state, &url).await;
        assert_eq!(left(&state, &url), None);
        drop(node);
        let free = async {
            while left(&state, &url).is_none() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, free).await.unwrap();
    }
}
