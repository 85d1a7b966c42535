//! A running node: the task that owns its router, sockets and map, and the handle to it.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use ipnet::IpNet;
use tailnode_wire::{
    keys::{DiscoKeyPair, DiscoPublicKey, ExportableKey},
    stun,
    tailcfg::{DerpMap, DerpNode, EndpointType, MapResponse, NetInfo, RegionId},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{JoinHandle, spawn_blocking, yield_now},
    time::sleep_until,
};
use tracing::{Instrument, debug, info, warn};
use url::Url;

use crate::{
    addresses::{Addresses, Watch},
    auth_key::AuthKey,
    carriers::{Carrier, Carriers},
    clock::{Clock, Latest},
    control, derp,
    device::{Closed, Device, Offload, PACKET_ROOM, Received},
    dial,
    dns::{Resolver, Upstreams, Zone},
    neighbours::{Door, Neighbours, Presence},
    netcheck::{Netcheck, Report, Target},
    netmap::{Changes, Lock, Netmap},
    offload::{Burst, Joiner},
    packet::Packet,
    router::{Lead, Out, Router, Taken, To},
    routes::{self, Preferences},
    segment::{Membership, Segment},
    state::{self, Store},
    status::{Login, Status},
    udp::{Batch, Udp},
};

/// Packets handled from one source before the others have their turn.
const TURN: usize = 64;
/// Bytes handled before the others have theirs: some 200 µs of encryption, which is what a packet of
/// another flow may have to wait.
const TURN_BYTES: usize = 512 * 1024;
/// Bytes collected before they are sent: enough for trains and bursts, and still in the cache.
const FLUSH: usize = 256 * 1024;
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
/// How often it is kept until when the node has run, beside when it ends: after a crash it may be
/// off by this.
const MARK_EVERY: Duration = Duration::from_secs(600);
/// At most how often the map is written to disk, and so much later for each peer in it: the more
/// there are, the more it costs, and the more often one of them changes.
const SAVE_EVERY: Duration = Duration::from_secs(5);
const SAVE_EVERY_PEER: Duration = Duration::from_millis(5);

/// What a node needs to be.
#[derive(Debug)]
pub struct Config {
    /// Where its keys and last map are kept; made if it does not exist, mode 0700.
    pub state_dir: PathBuf,
    /// The control server.
    pub login_server: Url,
    /// What to join with; a known node needs nothing.
    pub auth_key: Option<AuthKey>,
    /// The name to ask for.
    pub hostname: String,
    /// Tags to ask for, `tag:` included.
    pub tags: Vec<String>,
    /// Which of the tailnet's routes to take and to offer.
    pub routes: Preferences,
    /// Ask to be forgotten when gone.
    pub ephemeral: bool,
    /// Whether the container looks names up in the tailnet, whichever server it asks.
    pub accept_dns: bool,
    /// Suffixes of names that another resolver of the container knows: not asked of the host's.
    pub names_elsewhere: Vec<String>,
    /// A non-blocking TUN device with `IFF_NO_PI` and `IFF_VNET_HDR`, in any namespace.
    pub tun: OwnedFd,
    /// Which packets the kernel may hand over, and take, joined.
    pub offload: Offload,
    /// The other nodes of this process.
    pub neighbours: Neighbours,
    /// Its threads for packets.
    pub carriers: Carriers,
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

/// What of the tailnet shows in a node's network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// The node's own addresses. They seldom change: a node that was forgotten and joined again may
    /// get others.
    pub addresses: Vec<IpAddr>,
    /// The peers' own addresses.
    pub peers: BTreeSet<IpNet>,
    /// Subnets behind them, those of an exit left out.
    pub subnets: BTreeSet<IpNet>,
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
    /// It joins by an OAuth client, which makes keys only for tagged nodes.
    #[error(
        "an OAuth client makes auth keys for tagged nodes only: give the network or the container \
         tags that the client owns, `tags=tag:NAME`"
    )]
    NoTags,
    /// The control server refused it for good.
    #[error("the control server {server} refused the node: {reason}")]
    Refused {
        /// The control server's URL.
        server: Url,
        /// Its words.
        reason: String,
    },
    /// A person must log in first.
    #[error(
        "log in{}{reason}: open {url}",
        if reason.is_empty() { "" } else { ", " }
    )]
    NeedsLogin {
        /// The page.
        url: String,
        /// Why a node that had joined must join again.
        reason: String,
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
    #[error("the node waits for approval: approve it in the admin console of {server}")]
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
    /// It left, but the control server does not know.
    #[error(
        "the node has left the tailnet, but the control server {server} was not told ({reason}): \
         delete it there"
    )]
    LogoutUnheard {
        /// The control server's URL.
        server: Url,
        /// Why not.
        reason: String,
    },
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
    reach: watch::Receiver<Reach>,
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
    Logout(oneshot::Sender<Result<(), String>>),
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
    /// What the device reads into.
    packet: Vec<u8>,
    /// Where a burst is cut.
    cut: Vec<u8>,
    batch: Batch,
    out: Out,
    joiner: Joiner,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            packet: vec![0; PACKET_ROOM],
            cut: Vec::new(),
            batch: Batch::default(),
            out: Out::default(),
            joiner: Joiner::default(),
        }
    }
}

impl Node {
    /// Starts a node. Returns once its state and sockets are open, without waiting for the network.
    pub async fn start(config: Config) -> Result<Self, Error> {
        let kernel = |doing| move |source| Error::Kernel { doing, source };
        if config.tags.is_empty() && config.auth_key.as_ref().is_some_and(AuthKey::needs_tags) {
            return Err(Error::NoTags);
        }
        let store = Store::open(&config.state_dir, &config.login_server)?;
        let ran_until = store.latest();
        let mut keys = store.keys()?;
        if ran_until.is_some_and(|until| until > SystemTime::now()) {
            warn!(
                hostname = config.hostname,
                "the host's clock was set back; peers will hear of it, and take handshakes that \
                 are older than the last"
            );
            // Who gets a new disco key has started anew to all peers, who forget their sessions and
            // with them the time of the last handshake (ipnlocal: discoChangedLocked).
            keys.disco = DiscoKeyPair::random();
            store.save_keys(&keys)?;
        }
        if config.ephemeral && keys.replaces.take().is_some() {
            // It is another node each time anyway.
            store.save_keys(&keys)?;
        }
        let saved = store.load_netmap();
        let carrier = config
            .carriers
            .take()
            .map_err(kernel("start a thread for packets"))?;
        // What waits for packets and messages does so in the carrier's loop: each step of them to another
        // thread would take longer than what is to be done there.
        let runtime = carrier.runtime.clone();
        let lock = saved
            .as_ref()
            .map(|map| map.lock.clone())
            .unwrap_or_default();
        let tls = dial::tls_config();
        let (events_tx, events) = mpsc::channel(16);
        let (incoming_tx, incoming) = mpsc::channel(256);
        let (replies_tx, replies) = mpsc::channel(64);
        let (commands, commands_rx) = mpsc::channel(16);
        let (identity_tx, identity) = watch::channel(Known::default());
        let (login_tx, login) = watch::channel(Login::Starting);
        let (reach_tx, reach) = watch::channel(Reach::default());
        let known = saved
            .as_ref()
            .is_some_and(|map| !map.myself.addresses.is_empty());

        let plain_http = config.login_server.scheme() == "http";
        let entered = runtime.enter();
        let relays = derp::Relays::new(keys.node.clone(), tls.clone(), plain_http, incoming_tx);
        let port = usual_port(&keys.disco.public);
        let mut router = Router::new(&keys);
        router.prefer(config.routes.clone());
        router.take_queries(config.accept_dns);
        let own_key = router.key();
        let session = control::spawn(
            control::Config {
                login_server: config.login_server.clone(),
                auth_key: config.auth_key,
                hostname: config.hostname.clone(),
                tags: config.tags,
                routes: config.routes.offered(),
                ephemeral: config.ephemeral,
                known,
                lock,
                tls,
            },
            keys,
            events_tx,
        );
        drop(entered);
        // The kernel may be moving the device just now, and makes whoever would change it wait for the
        // end of that, 15 ms: the session is under way meanwhile.
        let its_loop = runtime.clone();
        let device = spawn_blocking(move || {
            let _entered = its_loop.enter();
            Device::new(config.tun, config.offload)
        });
        let device = device.await.map_err(io::Error::other).flatten();
        let device = device.map_err(kernel("use the TUN device"))?;
        let _entered = runtime.enter();
        let udp = Udp::open(port, config.offload != Offload::None)
            .map_err(kernel("open a UDP socket"))?;
        let watch = Watch::open().map_err(kernel("watch the host's addresses"))?;
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

        let door = Arc::new(Door::new(device, router, resolver.answers()));
        let mut task = Task {
            hostname: config.hostname.clone(),
            server: config.login_server.clone(),
            _carrier: carrier,
            presence: config.neighbours.enter(own_key, &door),
            neighbours: config.neighbours,
            door,
            udp,
            watch,
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
            session: Some(session),
            clock: Clock::of_host(),
            latest: Latest::begin(),
            next_mark: Instant::now(),
            ephemeral: config.ephemeral,
            store: Arc::new(store),
            saving: None,
            save_at: None,
            netmap: Netmap::default(),
            resolver,
            zone: zone.clone(),
            known: identity_tx,
            login: login_tx,
            reach: reach_tx,
            routes: config.routes,
            rx_bytes: 0,
            tx_bytes: 0,
            segment: None,
            joining: None,
        };
        let is_saved = saved.is_some();
        task.netmap = saved.unwrap_or_default();
        task.netmap.share(task.neighbours.known.clone());
        if is_saved {
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
        };
        runtime.spawn(task.run(inputs).instrument(span));
        Ok(Self {
            commands,
            shared: Arc::new(Shared {
                server: config.login_server,
                hostname: config.hostname,
                identity,
                login,
                reach,
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
                Login::NeedsLogin { url, reason } => {
                    return Err(Error::NeedsLogin {
                        url: url.clone(),
                        reason: reason.clone(),
                    });
                }
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
            routes: routes::Status::default(),
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

    /// Leaves the tailnet, for as long as the node runs: the control server is told to forget it.
    ///
    /// # Errors
    /// If the control server could not be told. The node has left all the same.
    pub async fn logout(&self) -> Result<(), Error> {
        let (done, finished) = oneshot::channel();
        self.commands
            .send(Command::Logout(done))
            .await
            .map_err(|_| Error::Stopped)?;
        let told = finished.await.map_err(|_| Error::Stopped)?;
        told.map_err(|reason| Error::LogoutUnheard {
            server: self.shared.server.clone(),
            reason,
        })
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
    /// tailnet but under its policy, once it has one in the tailnet. IPv4 only.
    pub async fn join(&self, segment: Segment, address: IpNet) {
        // A stopped node is a member of nothing.
        let _ = self.commands.send(Command::Join(segment, address)).await;
    }

    /// Who the node is and what is reached through its peers, as it changes.
    pub fn reach(&self) -> watch::Receiver<Reach> {
        self.shared.reach.clone()
    }
}

struct Task {
    hostname: String,
    server: Url,
    /// On which it runs.
    _carrier: Arc<Carrier>,
    door: Arc<Door>,
    neighbours: Neighbours,
    /// By which neighbours find the door; another one with each key.
    presence: Presence,
    udp: Udp,
    watch: Watch,
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
    /// `None`: logged out.
    session: Option<control::Handle>,
    clock: Clock,
    latest: Latest,
    /// When it is next kept until when the node has run.
    next_mark: Instant,
    ephemeral: bool,
    store: Arc<Store>,
    /// The writing of a map that is under way.
    saving: Option<JoinHandle<()>>,
    /// When to write the map to disk; `None`: there it is as it is here.
    save_at: Option<Instant>,
    netmap: Netmap,
    resolver: Resolver,
    zone: Zone,
    known: watch::Sender<Known>,
    login: watch::Sender<Login>,
    reach: watch::Sender<Reach>,
    routes: Preferences,
    rx_bytes: u64,
    tx_bytes: u64,
    segment: Option<Membership>,
    /// What it is to join once it has an address in the tailnet.
    joining: Option<(Segment, IpNet)>,
}

struct Inputs {
    events: mpsc::Receiver<control::Event>,
    incoming: mpsc::Receiver<derp::Incoming>,
    replies: mpsc::Receiver<Vec<u8>>,
    questions: mpsc::Receiver<Vec<u8>>,
    commands: mpsc::Receiver<Command>,
    targets: mpsc::Receiver<Vec<Target>>,
    nearest: mpsc::Receiver<RegionId>,
}

/// Has `net` in `nets` or not. Returns whether that is new.
fn set(nets: &mut BTreeSet<IpNet>, net: IpNet, is_in: bool) -> bool {
    match is_in {
        true => nets.insert(net),
        false => nets.remove(&net),
    }
}

/// After a turn that left something, the loop of the thread looks what else there is to do.
async fn others_first(more: Result<bool, Closed>) -> Result<(), Closed> {
    if more? {
        yield_now().await;
    }
    Ok(())
}

impl Task {
    async fn run(mut self, mut inputs: Inputs) {
        let mut stopped = None;
        // One timer that is set anew only when the deadline changes: to make one for each packet costs more.
        let mut timer = pin!(sleep_until(self.deadline().into()));
        let (why, logout) = loop {
            let deadline = self.deadline().into();
            if timer.deadline() != deadline {
                timer.as_mut().reset(deadline);
            }
            let turn = tokio::select! {
                ready = self.door.device.readable() => match ready {
                    Ok(()) => others_first(self.serve_tun(Device::receive)).await,
                    Err(error) => Err(Closed::Failed(error)),
                },
                ready = self.udp.readable() => match ready {
                    Ok(()) => others_first(self.serve_udp()).await,
                    Err(error) => Err(Closed::Failed(error)),
                },
                changed = self.watch.changed() => {
                    self.next_check = self.next_check.min(Instant::now() + SETTLE);
                    changed.map_err(Closed::Failed)
                }
                Some(first) = inputs.incoming.recv() => self.serve_relays(first, &mut inputs.incoming),
                Some(packet) = inputs.replies.recv() => self.door.device.send(&packet),
                Some(question) = inputs.questions.recv() => self.serve_resolver(&question),
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
                () = self.relays.changed() => {
                    self.relays_changed();
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
                        self.join(segment, address);
                        Ok(())
                    }
                    Some(Command::Siblings(zones)) => {
                        self.resolver.set_siblings(zones);
                        Ok(())
                    }
                    Some(Command::Logout(done)) => {
                        self.log_out(done);
                        Ok(())
                    }
                    Some(Command::Stop { logout, done }) => {
                        stopped = Some(done);
                        break (None, logout);
                    }
                },
                () = &mut timer => self.tick(),
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
            door,
            presence,
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
        drop((presence, segment, udp, relays));
        // The kernel takes some 20 ms to end a device, in which other nodes want this thread.
        let closed = spawn_blocking(move || drop(door));
        if logout && let Some(session) = session {
            // It logs its own failure, and nobody is there to hear of it.
            let _ = session.logout(LOGOUT).await;
        }
        if let Some(saving) = saving {
            // It logs its own failures.
            let _ = saving.await;
        }
        // It does nothing but close.
        let _ = closed.await;
        drop(store);
        login.send_replace(Login::Stopped);
        if let Some(done) = stopped {
            // Whoever asked may have stopped waiting.
            let _ = done.send(());
        }
    }

    /// Takes what the container sends. Returns whether there may be more.
    fn serve_tun(
        &mut self,
        receive: for<'a> fn(&Device, &'a mut [u8]) -> Received<'a>,
    ) -> Result<bool, Closed> {
        let now = Instant::now();
        self.stir(now);
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch {
                packet,
                cut,
                out,
                joiner,
                ..
            } = scratch;
            let (mut bytes, mut more) = (0, true);
            for _ in 0..TURN {
                let Some((header, packet)) = receive(&self.door.device, packet)? else {
                    more = false;
                    break;
                };
                bytes += packet.len();
                let burst = match Burst::new(header, packet) {
                    Ok(burst) => burst,
                    Err(misfit) => {
                        debug!(%misfit, "dropped");
                        continue;
                    }
                };
                self.serve_burst(Router::outbound, &burst, cut, out, now);
                if out.len() > FLUSH {
                    self.flush(out, joiner)?;
                }
                if bytes > TURN_BYTES {
                    break;
                }
            }
            self.flush(out, joiner)?;
            Ok(more)
        })
    }

    /// Takes what the network brings, and what the container answers at once. Returns whether there may be
    /// more of the network's.
    fn serve_udp(&mut self) -> Result<bool, Closed> {
        let now = Instant::now();
        let before = self.rx_bytes;
        let more = SCRATCH.with_borrow_mut(|scratch| {
            let Scratch {
                batch, out, joiner, ..
            } = scratch;
            let (mut bytes, mut more) = (0, true);
            for _ in 0..TURN {
                match self.udp.receive(batch) {
                    Ok(left) => more = left,
                    // A pending ICMP error of some address: the datagram it is about is lost.
                    Err(error) => {
                        debug!(%error, "UDP reports an error");
                        continue;
                    }
                }
                for (from, train, size) in batch.trains() {
                    bytes += train.len();
                    if train.chunks(size).any(stun::is_stun) {
                        // No server of STUN's is a peer.
                        for datagram in train.chunks(size) {
                            if self.netcheck.answer(datagram, now) && !self.netcheck.waiting(now) {
                                self.next_check = now;
                            }
                        }
                    } else {
                        self.next_tick.get_or_insert(now + FIRST_TICK);
                        self.door.router().on_udp(from, train, size, now, out);
                    }
                    if out.len() > FLUSH {
                        self.flush(out, joiner)?;
                    }
                }
                if !more || bytes > TURN_BYTES {
                    break;
                }
            }
            self.flush(out, joiner)?;
            Ok::<_, Closed>(more)
        })?;
        if self.rx_bytes != before {
            // What is left then is told of.
            self.serve_tun(Device::receive_untold)?;
        }
        Ok(more)
    }

    fn serve_relays(
        &mut self,
        first: derp::Incoming,
        more: &mut mpsc::Receiver<derp::Incoming>,
    ) -> Result<(), Closed> {
        let now = Instant::now();
        self.stir(now);
        SCRATCH.with_borrow_mut(|Scratch { out, joiner, .. }| {
            let mut next = Some(first);
            let mut turn = 0;
            while let Some(incoming) = next {
                self.door.router().on_relay(
                    incoming.region,
                    &incoming.from,
                    &incoming.packet,
                    now,
                    out,
                );
                turn += 1;
                next = if turn < TURN && out.len() < FLUSH {
                    more.try_recv().ok()
                } else {
                    None
                };
            }
            self.flush(out, joiner)
        })
    }

    /// Sends a burst to where `judge` says.
    fn serve_burst(
        &mut self,
        judge: fn(&mut Router, &Packet<'_>, Instant) -> Taken,
        burst: &Burst<'_>,
        cut: &mut Vec<u8>,
        out: &mut Out,
        now: Instant,
    ) {
        let Ok(packet) = Packet::parse(burst.bytes()) else {
            return;
        };
        let len = burst.bytes().len() as u64;
        let mut router = self.door.router();
        if let Some(membership) = &self.segment
            && membership.concerns(packet.src(), packet.dst())
        {
            if let Some((packet, door)) = membership.stand_in(packet)
                && router.may_leave(&packet, now)
            {
                self.tx_bytes += len;
                let key = router.key();
                drop(router);
                door.take(&key, burst, &packet, now);
            }
            return;
        }
        match judge(&mut router, &packet, now) {
            Taken::Dropped => {}
            Taken::ForResolver => burst.packets(cut, |packet| self.resolver.handle(packet)),
            Taken::ForPeer(slot) => {
                self.tx_bytes += len;
                match self.neighbours.find(&router.peer_key(slot)) {
                    Some(door) => {
                        let key = router.key();
                        drop(router);
                        door.take(&key, burst, &packet, now);
                    }
                    None => router.seal(slot, burst, now, out),
                }
            }
        }
    }

    /// A question of the resolver's to a server that is a peer.
    fn serve_resolver(&mut self, question: &[u8]) -> Result<(), Closed> {
        let now = Instant::now();
        self.stir(now);
        SCRATCH.with_borrow_mut(|Scratch { out, joiner, .. }| {
            let mut cut = Vec::new();
            self.serve_burst(
                Router::question,
                &Burst::whole(question),
                &mut cut,
                out,
                now,
            );
            self.flush(out, joiner)
        })
    }

    /// Our own address, where we have one.
    fn ipv4(&self) -> Option<IpAddr> {
        let mut addresses = self.netmap.myself.addresses.iter().map(IpNet::addr);
        addresses.find(IpAddr::is_ipv4)
    }

    fn join(&mut self, segment: Segment, address: IpNet) {
        let Some(tailnet) = self.ipv4() else {
            if !self.identity().addresses.is_empty() {
                warn!(%address, "no IPv4 address in the tailnet, so none in the host's network");
            }
            self.joining = Some((segment, address));
            return;
        };
        let door = Arc::downgrade(&self.door);
        self.segment = Some(segment.join(address, tailnet, door));
    }

    /// Sends what the router put out: datagrams to one address as one train.
    fn flush(&mut self, out: &mut Out, joiner: &mut Joiner) -> Result<(), Closed> {
        let mut failed: Vec<SocketAddr> = Vec::new();
        for (to, bytes, segment) in out.trains(|segment| self.udp.train(segment)) {
            match to {
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
        let (bytes, packets) = out.for_container();
        self.door.keep_for_container(bytes, packets);
        self.rx_bytes += packets
            .iter()
            .map(|packet| packet.len() as u64)
            .sum::<u64>();
        self.door.device.send_all(bytes, packets, joiner)?;
        out.clear();
        for address in failed {
            self.door.router().unreachable(address);
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
        if let Some(at) = self.save_at {
            deadline = deadline.min(at);
        }
        deadline
    }

    fn tick(&mut self) -> Result<(), Closed> {
        let now = Instant::now();
        if self.save_at.is_some_and(|at| now >= at) {
            self.save();
        }
        if now >= self.next_check {
            self.check(now);
        }
        if self.next_tick.is_some_and(|at| now >= at) {
            SCRATCH.with_borrow_mut(|Scratch { out, joiner, .. }| {
                self.next_tick = self.door.router().tick(now, out);
                self.flush(out, joiner)
            })?;
            // Peers are about to look for a path: stale endpoints would not open our NAT.
            let stale = |age| self.checked_at.is_none_or(|at| now >= at + age);
            if self.door.router().has_lost_a_path() && stale(CHECK_LOST) {
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
        // Looked at often, so that no handshake was later than it.
        self.latest.look();
        if now >= self.next_mark {
            self.save();
        }
        let expired = self.netmap.expire(self.clock.now());
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
                self.door.router().reset_paths();
                self.relays.set_addresses(&local.all);
                self.asked_nearest = false;
            }
            if local.goes_another_way_than(&self.local)
                && let Some(session) = &self.session
            {
                session.moved();
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
        if !report.by_stun && !self.netcheck.waiting(now) && !self.asked_nearest {
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
        self.door
            .router()
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
        if let Some(session) = &self.session {
            session.advertise(control::Advertised {
                endpoints,
                net_info,
            });
        }
    }

    /// Leaves the tailnet; what is left is a node that talks to nobody, until it is stopped.
    fn log_out(&mut self, done: oneshot::Sender<Result<(), String>>) {
        self.login.send_replace(Login::Stopped);
        self.netmap = Netmap::default();
        self.take_changes(&Changes::everything(), false);
        self.save_within(SAVE_EVERY);
        let session = self.session.take();
        tokio::spawn(async move {
            let told = match session {
                Some(session) => session.logout(LOGOUT).await,
                None => Ok(()),
            };
            // Whoever asked may have stopped waiting.
            let _ = done.send(told);
        });
    }

    fn control(&mut self, event: control::Event) {
        if self.session.is_none() {
            // What the session said before it ended counts no more.
            return;
        }
        match event {
            control::Event::Login(login) => {
                info!(?login, "control");
                self.login.send_replace(login);
            }
            control::Event::Lock(lock) => {
                let changes = self.netmap.set_lock(lock);
                let live = self.known.borrow().live;
                self.take_changes(&changes, live);
                self.save_within(SAVE_EVERY);
            }
            control::Event::Map { response, first } => self.map(*response, first),
            control::Event::Keys { keys, kept } => {
                if let Err(error) = self.store.save_keys(&keys) {
                    warn!(%error, "cannot keep the new node key");
                }
                // The session may have ended.
                let _ = kept.send(());
                if self.door.router().key() == keys.node.public {
                    return;
                }
                self.door.router().set_keys(&keys);
                self.relays.set_key(keys.node.clone());
                self.presence = self.neighbours.enter(keys.node.public, &self.door);
            }
        }
    }

    fn map(&mut self, response: MapResponse, first: bool) {
        if let Some(now) = response.control_time {
            self.clock.set(now);
        }
        let now = self.clock.now();
        let changes = if first {
            self.netmap.restart(response, now)
        } else {
            self.netmap.apply(response, now)
        };
        self.take_changes(&changes, true);
        let peers = u32::try_from(self.netmap.peers.len()).unwrap_or(u32::MAX);
        self.save_within(match first {
            true => SAVE_EVERY,
            false => SAVE_EVERY + SAVE_EVERY_PEER * peers,
        });
    }

    fn take_changes(&mut self, changes: &Changes, live: bool) {
        let now = Instant::now();
        let mut router = self.door.router();
        let rerouted = router.update(&self.netmap, changes, now);
        if router.waits_for_peers() {
            // They may be where they can be reached now.
            self.next_tick = Some(now);
        }
        drop(router);
        if changes.derp {
            self.relays.set_map(self.netmap.derp_map.clone());
            self.relays_changed();
            tokio::spawn(stun_targets(
                self.netmap.derp_map.clone(),
                self.targets_tx.clone(),
            ));
        }
        if changes.dns || changes.myself || changes.all_peers {
            self.zone.set(
                &self.netmap.myself,
                self.netmap.peers.values().map(Arc::as_ref),
                &self.netmap.dns,
            );
        } else {
            for id in &changes.peers {
                let peer = self.netmap.peers.get(id);
                self.zone.update(*id, peer.map(Arc::as_ref));
            }
        }
        let identity = self.identity();
        if identity.addresses.is_empty() {
            return;
        }
        if changes.myself || !rerouted.is_empty() {
            self.publish_reach(&identity, &rerouted);
        }
        if changes.myself
            && let Some(tailnet) = self.ipv4()
        {
            if let Some(membership) = &mut self.segment {
                membership.follow(tailnet);
            }
            if let Some((segment, address)) = self.joining.take() {
                self.join(segment, address);
            }
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

    /// Tells what is ours and, of what may be `rerouted`, what leads to peers or behind them.
    fn publish_reach(&self, identity: &Identity, rerouted: &[IpNet]) {
        let router = self.door.router();
        let mut routes_changed = rerouted.iter().any(|net| net.prefix_len() == 0);
        self.reach.send_if_modified(|reach| {
            let mut changed = reach.addresses != identity.addresses;
            if changed {
                reach.addresses = identity.addresses.clone();
            }
            for &net in rerouted {
                let lead = router.leads(net);
                let is_subnet = lead == Some(Lead::Behind) && net.prefix_len() > 0;
                changed |= set(&mut reach.peers, net, lead == Some(Lead::ToPeer));
                routes_changed |= set(&mut reach.subnets, net, is_subnet);
            }
            changed || routes_changed
        });
        if !routes_changed {
            return;
        }
        let everything = [
            IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
            IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
        ];
        let mut routed: Vec<IpNet> = self.reach.borrow().subnets.iter().copied().collect();
        if everything.iter().any(|&net| router.leads(net).is_some()) {
            routed.extend(routes::beyond_exits());
        }
        self.zone.set_routed(&routed);
    }

    /// Takes account of which relays there are and which of them are out of reach.
    fn relays_changed(&mut self) {
        let lost = self.relays.lost();
        let regions = self.netmap.derp_map.regions.keys();
        let regions = regions.filter(|id| !lost.contains(id)).copied().collect();
        self.door.router().set_relays(regions);
        if self.netcheck.set_lost(lost) {
            self.asked_nearest = false;
            self.next_check = Instant::now();
        }
    }

    /// Has the map written to disk at the latest after `time`.
    fn save_within(&mut self, time: Duration) {
        let at = Instant::now() + time;
        self.save_at = Some(self.save_at.map_or(at, |before| before.min(at)));
    }

    /// Writes to disk what is newer here, off this thread: the disk may take its time.
    fn save(&mut self) {
        let netmap = self.save_at.take().map(|_| self.netmap.clone());
        let latest = self.latest.look();
        let (store, before) = (self.store.clone(), self.saving.take());
        self.next_mark = Instant::now() + MARK_EVERY;
        self.saving = Some(tokio::spawn(async move {
            // One after the other, so that the newest map is the one that stays.
            if let Some(before) = before {
                let _ = before.await;
            }
            let write = move || {
                if let Some(netmap) = netmap
                    && let Err(error) = store.save_netmap(&netmap)
                {
                    warn!(%error, "cannot keep the map: without it the node cannot start while the control server is away");
                }
                if let Err(error) = store.save_latest(latest) {
                    warn!(%error, "cannot keep until when the node ran: should the clock be set back, peers would not take its handshakes");
                }
            };
            if let Err(error) = spawn_blocking(write).await {
                warn!(%error, "cannot keep the node's state");
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
        let (myself, peers) = (&self.netmap.myself, self.netmap.peers.values());
        let peers = peers.map(Arc::as_ref);
        let (routes, trouble) = self.routes.status(myself, peers);
        let mut health = [self.netmap.health_lines(), self.relays.troubles()].concat();
        health.extend(trouble);
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
            health,
            routes,
            peers: self
                .door
                .router()
                .peers(now, region, |key| self.neighbours.find(key).is_some()),
            rx_bytes: self.rx_bytes + self.door.rx_bytes(),
            tx_bytes: self.tx_bytes,
        }
    }
}

/// Takes a node that does not run out of its tailnet, and removes what is kept of it.
///
/// # Errors
/// If it runs, or its state cannot be read: then nothing is removed. [`Error::LogoutUnheard`] says
/// that all is done but the first.
pub async fn forget(dir: &Path, hostname: &str) -> Result<(), Error> {
    let (store, keys) = Store::reopen(dir)?;
    let saved = store.load_netmap();
    let config = control::Config {
        login_server: store.login_server().clone(),
        auth_key: None,
        hostname: hostname.to_owned(),
        tags: Vec::new(),
        routes: Vec::new(),
        ephemeral: false,
        known: true,
        lock: Lock::default(),
        tls: dial::tls_config(),
    };
    // A server that never let it in would take it for a newcomer.
    let told = match saved.is_some_and(|map| !map.myself.addresses.is_empty()) {
        true => control::logout(&config, &keys, LOGOUT).await,
        false => Ok(()),
    };
    state::remove(dir).map_err(|source| state::Error::Write {
        path: dir.into(),
        source,
    })?;
    told.map_err(|reason| Error::LogoutUnheard {
        server: config.login_server,
        reason,
    })
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

    use tempfile::TempDir;
    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::device::tests::stand_in;

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
        let (tun, container) = stand_in();
        let config = Config {
            state_dir: state.path().to_owned(),
            login_server: server.clone(),
            auth_key: None,
            hostname: "a".into(),
            tags: Vec::new(),
            routes: Preferences::default(),
            ephemeral: true,
            accept_dns: true,
            names_elsewhere: Vec::new(),
            tun,
            offload: Offload::All,
            neighbours: Neighbours::default(),
            carriers: Carriers::default(),
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
