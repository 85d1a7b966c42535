//! Which container has which node on which network.

use std::{
    collections::{HashMap, HashSet},
    mem,
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use ipnet::IpNet;
use tailnode_node::{
    Carriers, Login, Neighbours, Node, Offload, RoutePreferences, Secret, Segment, Zone,
};
use tailnode_tun::{Exit, Interface, Netns};
use tokio::{
    task::{AbortHandle, JoinSet},
    time::Instant,
};
use url::Url;

use crate::{
    Error,
    api::{ContainerStatus, Engine, Explained, Served, is_called},
    identities::{Identities, Identity, Kept, User},
    interface::{self, Device, Wanted, blocking},
    options::{self, Layer, Settled, Surface, Told, settle},
    secrets::{Found, Secrets},
};

/// How long a detach is waited for. A node that cannot reach its control server to log out goes on
/// trying after that, and the engine does not wait.
const DETACH: Duration = Duration::from_secs(3);

/// After a control server did not let a node join in time, for how long other new nodes wait for it
/// only [`SILENT_PATIENCE`]: while Podman's plugin waits, no other container of the host starts.
const SILENT: Duration = Duration::from_secs(30);
/// Longer than a server that is well takes: a Headscale nearby needs two seconds.
const SILENT_PATIENCE: Duration = Duration::from_secs(4);

/// For how long the status tells of a container that did not start because somebody must let it in.
const WAITING: Duration = Duration::from_secs(3600);

/// A daemon that is only there for its nodes outlives the last by this, which is long enough for a
/// container that restarts.
const UNUSED: Duration = Duration::from_secs(2);

/// The suffix of names on Podman's bridges (containers-common: defaultDNSDomain).
const PODMAN_NAMES: &str = "dns.podman";

/// A container's place on a network.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) engine: Engine,
    /// The container's id with Podman and CNI, the endpoint's with Docker.
    pub(crate) id: String,
    pub(crate) network_id: String,
}

/// A container that wants a node.
pub(crate) struct Guest {
    pub(crate) key: Key,
    pub(crate) container_id: String,
    pub(crate) container_name: String,
    pub(crate) network_name: String,
    /// The names of all containers that the engine has, if it is known.
    pub(crate) exist: Option<HashSet<String>>,
    /// The address that the engine itself has chosen for it, on a network of this host alone.
    pub(crate) address: Option<IpNet>,
    /// What is set for it above the host's configuration, the lowest first.
    pub(crate) layers: Vec<Layer>,
}

/// The device that its node serves.
pub(crate) enum Tun {
    /// In the container already, or on its way there.
    Given(OwnedFd),
    /// To be made here under this name; the engine moves it.
    Make(String),
}

/// A node that is ready.
pub(crate) struct Ready {
    /// How the device is to be set up.
    pub(crate) interface: Interface,
    pub(crate) dns_servers: Vec<IpAddr>,
    pub(crate) search_domains: Vec<String>,
    endpoint: Arc<Endpoint>,
}

/// The nodes of all the host's containers.
pub(crate) struct Endpoints {
    defaults: Layer,
    secrets: Arc<Secrets>,
    identities: Identities,
    host: (u64, u64),
    /// All nodes of this daemon.
    neighbours: Neighbours,
    carriers: Carriers,
    offload: Offload,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    endpoints: HashMap<Key, Arc<Endpoint>>,
    /// While endpoints are being attached.
    turns: HashMap<Key, Turn>,
    /// By the engine's id of the network: what its containers share on this host.
    segments: HashMap<String, Segment>,
    /// Control servers that did not let a node join in time, and when.
    silent: HashMap<Url, Instant>,
    /// Containers that did not start because somebody must let them in: how they were, and when.
    waiting: Vec<(ContainerStatus, Instant)>,
    /// Set when the daemon stops.
    closed: bool,
}

impl State {
    /// How long to wait for a control server.
    fn patience(&mut self, server: &Url, now: Instant, deadline: Instant) -> Duration {
        self.silent.retain(|_, since| now < *since + SILENT);
        let left = deadline.saturating_duration_since(now);
        if self.silent.contains_key(server) {
            left.min(SILENT_PATIENCE)
        } else {
            left
        }
    }

    /// Remembers how waiting for a control server ended.
    fn heard(&mut self, server: &Url, error: Option<&tailnode_node::Error>, now: Instant) {
        match error {
            None => {
                self.silent.remove(server);
            }
            // Not anew after a short wait, or a slow server would never be waited for again.
            Some(tailnode_node::Error::Unreachable { .. }) => {
                self.silent.entry(server.clone()).or_insert(now);
            }
            Some(_) => {}
        }
    }
}

/// What the attaches of one key that are under way share.
#[derive(Default)]
struct Turn {
    /// Held by one after the other.
    lock: Arc<tokio::sync::Mutex<()>>,
    /// How often the key was detached meanwhile: who began before that must not go on.
    detached: u32,
}

impl State {
    /// Whether an attach that began at `turn` may still put its endpoint in place.
    fn wants(&self, key: &Key, turn: u32) -> bool {
        let wanted = |now: &Turn| now.detached == turn;
        !self.closed && self.turns.get(key).is_some_and(wanted)
    }

    /// Forgets that a container waited to be let in, and those for whom nobody came.
    fn forget_waiting(&mut self, guest: &Guest, now: Instant) {
        self.waiting.retain(|(status, since)| {
            let same =
                status.container == guest.container_name && status.network == guest.network_name;
            !same && now < *since + WAITING
        });
    }

    /// Whether this very endpoint is the one in its place.
    fn has(&self, endpoint: &Arc<Endpoint>) -> bool {
        self.endpoints
            .get(&endpoint.guest.key)
            .is_some_and(|here| Arc::ptr_eq(here, endpoint))
    }
}

struct Endpoint {
    guest: Guest,
    /// The device's number in its container, where its name does not tell it.
    number: Option<u32>,
    node: Node,
    login_server: Url,
    ephemeral: bool,
    /// Whether the container does not start before somebody has let its node in.
    requires_login: bool,
    accepts_dns: bool,
    routes: RoutePreferences,
    exit: Exit,
    /// Its options, and who set them.
    told: Vec<Told>,
    held: Mutex<Held>,
}

/// What an endpoint lets go of when it ends.
#[derive(Default)]
struct Held {
    /// A second descriptor of the node's device, to find where it is.
    tun: Option<Arc<OwnedFd>>,
    identity: Option<Identity>,
    keeper: Option<AbortHandle>,
    /// Whether it is in its network's segment.
    joined: bool,
}

impl Endpoints {
    /// None yet. They will keep their state below `directory`; `defaults` is what the host's
    /// configuration sets.
    pub(crate) fn new(
        directory: PathBuf,
        defaults: Layer,
        secrets: Secrets,
        offload: Offload,
    ) -> Result<Self, Error> {
        Ok(Endpoints {
            defaults,
            secrets: Arc::new(secrets),
            identities: Identities::new(directory),
            host: Netns::current()?.id(),
            neighbours: Neighbours::default(),
            carriers: Carriers::default(),
            offload,
            state: Mutex::default(),
        })
    }

    /// Whether a network may have these options under the host's configuration.
    pub(crate) fn allows(&self, network: &Layer) -> Result<(), Error> {
        settle([&self.defaults, network]).map(|_| ())
    }

    /// The identities of all nodes, also of those that do not run.
    pub(crate) fn identities(&self) -> &Identities {
        &self.identities
    }

    /// Gives a container its node, and waits until `deadline` for its addresses. When this fails,
    /// nothing of it stays behind.
    pub(crate) async fn attach(
        self: &Arc<Self>,
        guest: Guest,
        tun: Tun,
        deadline: Instant,
    ) -> Result<Ready, Error> {
        let key = guest.key.clone();
        let (lock, turn) = {
            let mut state = self.state();
            let turn = state.turns.entry(key.clone()).or_default();
            (turn.lock.clone(), turn.detached)
        };
        let result = match tokio::time::timeout_at(deadline, lock.lock()).await {
            Ok(_held) => self.attach_in_turn(guest, tun, turn, deadline).await,
            Err(_) => Err(Error::StillStopping {
                hostname: guest.container_name,
            }),
        };
        // The map has one, we have one: nobody else waits for a turn.
        let mut state = self.state();
        if Arc::strong_count(&lock) == 2 {
            state.turns.remove(&key);
        }
        result
    }

    async fn attach_in_turn(
        self: &Arc<Self>,
        guest: Guest,
        tun: Tun,
        turn: u32,
        deadline: Instant,
    ) -> Result<Ready, Error> {
        let present = self.state().endpoints.get(&guest.key).cloned();
        let endpoint = match present {
            Some(endpoint) if endpoint.serves(&tun).await => endpoint,
            present => {
                if let Some(old) = present {
                    self.end_within(old, false, deadline).await;
                }
                self.start(guest, tun, turn, deadline).await?
            }
        };
        let ready = self.make_ready(&endpoint, deadline).await;
        self.state().forget_waiting(&endpoint.guest, Instant::now());
        match ready {
            Ok(ready) => Ok(ready),
            Err(error) => {
                if let Error::LoginRequired { .. } = error {
                    let status = endpoint.status().await;
                    self.state().waiting.push((status, Instant::now()));
                }
                // In the background: the time is up, and a logout may take some.
                let all = self.clone();
                tokio::spawn(async move { all.end(endpoint, true).await });
                Err(error)
            }
        }
    }

    async fn start(
        self: &Arc<Self>,
        guest: Guest,
        tun: Tun,
        turn: u32,
        deadline: Instant,
    ) -> Result<Arc<Endpoint>, Error> {
        let settled = settle(std::iter::once(&self.defaults).chain(&guest.layers))?;
        let found = self.auth_key(&guest.network_name, &settled).await?;
        let says_ephemeral = settled.surface("ephemeral").is_some();
        let (options, mut told) = (settled.options, settled.told);
        let login_server = options.login_server()?;
        // The secret of an OAuth client may say so too.
        let ephemeral = match found.as_ref().and_then(|found| found.key.ephemeral()) {
            Some(ephemeral) if !says_ephemeral => ephemeral,
            _ => options.ephemeral,
        };
        let accepts_dns = options.accepts_dns();
        let requires_login = options.require_login;
        let (routes, exit) = (options.routes()?, options.exit());
        let hostname = options
            .hostname
            .or_else(|| options::dns_label(&guest.container_name))
            .or_else(|| options::dns_label(guest.container_id.get(..12)?))
            .unwrap_or_else(|| "container".into());
        self.end_earlier(&guest, deadline).await;
        let user = User {
            engine: guest.key.engine,
            container: guest.container_name.clone(),
        };
        let identity = self
            .identities
            .take(
                &guest.network_name,
                &hostname,
                &user,
                guest.exist.as_ref(),
                deadline,
            )
            .await?;
        if found.as_ref().is_some_and(|found| found.by_login)
            && let Some(told) = told.iter_mut().find(|told| told.key == "auth-key")
        {
            told.value = "kept by tailnoded".into();
            told.origin = format!("tailnode login {}", guest.network_name);
        }
        for told in told.iter_mut().filter(|told| told.key == "hostname") {
            if identity.hostname != hostname {
                told.origin += &format!(", where {hostname} is in use");
            }
            told.value = identity.hostname.clone();
        }
        if !self.state().wants(&guest.key, turn) {
            return Err(Error::Detached);
        }

        let tun = match tun {
            Tun::Given(tun) => tun,
            Tun::Make(name) => blocking(move || tailnode_tun::create(&name)).await?,
        };
        let copy = tun
            .try_clone()
            .map_err(Error::file("copy the descriptor of", "/dev/net/tun"))?;
        tracing::info!(
            engine = %guest.key.engine,
            container = guest.container_name,
            network = guest.network_name,
            hostname = identity.hostname,
            %login_server,
            ephemeral,
            "starting a node"
        );
        // Podman writes the resolvers of all the container's networks into its resolv.conf; those of
        // its bridges know the containers there.
        let names_elsewhere = match guest.key.engine {
            Engine::Podman => vec![PODMAN_NAMES.to_owned()],
            Engine::Docker | Engine::Cni => Vec::new(),
        };
        let started = Node::start(tailnode_node::Config {
            state_dir: identity.directory.clone(),
            login_server: login_server.clone(),
            auth_key: found.map(|found| found.key),
            hostname: identity.hostname.clone(),
            tags: options.tags,
            routes: routes.clone(),
            ephemeral,
            accept_dns: accepts_dns,
            names_elsewhere,
            offload: self.offload,
            neighbours: self.neighbours.clone(),
            carriers: self.carriers.clone(),
            tun,
        })
        .await;
        let node = match started {
            Ok(node) => node,
            Err(error) => {
                if identity.fresh {
                    forget(identity).await;
                }
                return Err(error.into());
            }
        };
        identity.note_user().await;
        // CNI names the device as it likes, and attaches a container to one network after the other.
        let number = (guest.key.engine == Engine::Cni).then(|| self.free_number(&guest));
        let endpoint = Arc::new(Endpoint {
            guest,
            number,
            node,
            login_server,
            ephemeral,
            requires_login,
            accepts_dns,
            routes,
            exit,
            told,
            held: Mutex::new(Held {
                tun: Some(Arc::new(copy)),
                identity: Some(identity),
                ..Held::default()
            }),
        });
        let wanted = {
            let mut state = self.state();
            let key = &endpoint.guest.key;
            let wanted = state.wants(key, turn);
            if wanted {
                state.endpoints.insert(key.clone(), endpoint.clone());
            }
            wanted
        };
        if !wanted {
            endpoint.stop(true).await;
            return Err(Error::Detached);
        }
        let (all, watched) = (self.clone(), endpoint.clone());
        tokio::spawn(async move {
            watched.node.gone().await;
            all.end(watched, false).await;
        });
        Ok(endpoint)
    }

    /// The lowest number that none of the container's devices has.
    fn free_number(&self, guest: &Guest) -> u32 {
        let others = self.of_container(guest.key.engine, &guest.container_id);
        let taken: HashSet<u32> = others.iter().filter_map(|other| other.index()).collect();
        (0..).find(|number| !taken.contains(number)).unwrap_or(0)
    }

    /// Ends what is left of the container's earlier place on the network: Docker gives it another
    /// each time, and does not tell the end of one when it crashes.
    async fn end_earlier(self: &Arc<Self>, guest: &Guest, deadline: Instant) {
        let mut earlier = self.of_container(guest.key.engine, &guest.container_id);
        earlier.retain(|other| {
            let key = &other.guest.key;
            key.network_id == guest.key.network_id && key.id != guest.key.id
        });
        for endpoint in earlier {
            self.end_within(endpoint, false, deadline).await;
        }
    }

    /// What nodes of this network join with.
    async fn auth_key(&self, network: &str, settled: &Settled) -> Result<Option<Found>, Error> {
        let secrets = self.secrets.clone();
        let network = network.to_owned();
        let set = settled.options.auth_key.clone();
        let (own, host) = match settled.surface("auth-key") {
            Some(Surface::File) => (None, set),
            _ => (set, None),
        };
        blocking(move || secrets.find(&network, own.as_ref(), host.as_ref())).await
    }

    /// Keeps an auth key for the nodes that join a network from now on, or forgets it.
    pub(crate) async fn login(&self, network: String, key: Option<Secret>) -> Result<(), Error> {
        let secrets = self.secrets.clone();
        blocking(move || match key {
            Some(key) => {
                secrets.keep(&network, &key)?;
                tracing::info!(network, "keeping an auth key");
                Ok(())
            }
            None if secrets.forget(&network)? => {
                tracing::info!(network, "forgot the auth key");
                Ok(())
            }
            None => Err(Error::NoLogin { network }),
        })
        .await
    }

    async fn make_ready(
        self: &Arc<Self>,
        endpoint: &Arc<Endpoint>,
        deadline: Instant,
    ) -> Result<Ready, Error> {
        let patience = self
            .state()
            .patience(&endpoint.login_server, Instant::now(), deadline);
        let ready = endpoint.node.ready(patience).await;
        let guest = &endpoint.guest;
        let segment = {
            let mut state = self.state();
            state.heard(&endpoint.login_server, ready.as_ref().err(), Instant::now());
            if !state.has(endpoint) {
                return Err(Error::Detached);
            }
            let network_id = guest.key.network_id.clone();
            state.segments.entry(network_id).or_default().clone()
        };
        let identity = match ready {
            Ok(identity) => identity,
            Err(
                cause @ (tailnode_node::Error::NeedsLogin { .. }
                | tailnode_node::Error::NeedsApproval { .. }),
            ) => {
                if endpoint.requires_login {
                    return Err(Error::LoginRequired { cause });
                }
                // A person can let it in while the container runs.
                tracing::warn!(
                    container = guest.container_name,
                    network = guest.network_name,
                    "the container starts without the tailnet: {cause}"
                );
                tailnode_node::Identity::default()
            }
            Err(error) => return Err(error.into()),
        };
        let tun = endpoint.held().tun.clone();
        if guest.key.engine != Engine::Docker
            && let Some(tun) = tun
        {
            self.device(endpoint, tun).moved(deadline).await?;
        }
        self.introduce(guest.key.engine, &guest.container_id).await;
        if let Some(address) = guest.address
            && !mem::replace(&mut endpoint.held().joined, true)
        {
            endpoint.node.join(segment, address).await;
        }
        self.clone().keep(endpoint);
        let interface = self.wanted(endpoint, endpoint.index().unwrap_or(0));
        let (dns_servers, search_domains) = match endpoint.accepts_dns {
            true => (
                vec![interface::resolver(&interface)],
                identity.search_domains,
            ),
            false => (Vec::new(), Vec::new()),
        };
        Ok(Ready {
            interface,
            dns_servers,
            search_domains,
            endpoint: endpoint.clone(),
        })
    }

    /// Starts the task that keeps the endpoint's device set up, unless it runs.
    fn keep(self: Arc<Self>, endpoint: &Arc<Endpoint>) {
        let mut held = endpoint.held();
        let Some(tun) = held.tun.clone() else {
            return;
        };
        if held.keeper.is_some() {
            return;
        }
        let device = self.device(endpoint, tun);
        let reach = endpoint.node.reach();
        let kept = endpoint.clone();
        let keeper = tokio::spawn(async move {
            let result = device.keep(reach, |index| self.wanted(&kept, index)).await;
            let (container, network) = (&kept.guest.container_name, &kept.guest.network_name);
            match result {
                Ok(()) => {}
                // The container ended first.
                Err(Error::Tun(error @ tailnode_tun::Error::Gone { .. })) => {
                    tracing::debug!(container, network, "{error}");
                }
                Err(error) => tracing::error!(
                    container,
                    network,
                    "cannot set up the container's device: {error}"
                ),
            }
        });
        held.keeper = Some(keeper.abort_handle());
    }

    fn wanted(&self, endpoint: &Arc<Endpoint>, index: u32) -> Interface {
        let guest = &endpoint.guest;
        let before: Vec<Arc<Endpoint>> = self
            .of_container(guest.key.engine, &guest.container_id)
            .into_iter()
            .filter(|other| index > 0 && other.index().is_some_and(|other| other < index))
            .collect();
        let mut taken = HashSet::new();
        for other in before {
            let reach = other.node.reach().borrow().clone();
            taken.extend(reach.peers.into_iter().chain(reach.subnets));
        }
        interface::wanted(&Wanted {
            local: guest.address,
            index,
            reach: &endpoint.node.reach().borrow(),
            taken: &taken,
            trap_dns: guest.key.engine == Engine::Docker && endpoint.accepts_dns,
            exit: endpoint.exit,
            forwards: !endpoint.routes.offered().is_empty(),
        })
    }

    fn device(&self, endpoint: &Endpoint, tun: Arc<OwnedFd>) -> Device {
        Device {
            tun,
            engine: endpoint.guest.key.engine,
            number: endpoint.number,
            accepts_routes: endpoint.routes.accept,
            host: self.host,
        }
    }

    /// Leaves the endpoint's device alone from now on: Docker is about to take it out of the
    /// container. When the container joins again, the device is kept again.
    pub(crate) async fn release_device(&self, key: &Key) {
        let endpoint = self.state().endpoints.get(key).cloned();
        if let Some(endpoint) = endpoint {
            self.release(&endpoint).await;
        }
    }

    /// Takes back what the device would leave behind in a container that lives on.
    async fn release(&self, endpoint: &Endpoint) {
        let (keeper, tun) = {
            let mut held = endpoint.held();
            (held.keeper.take(), held.tun.clone())
        };
        if let Some(keeper) = keeper {
            keeper.abort();
        }
        let changes_container = endpoint.exit != Exit::No || !endpoint.routes.offered().is_empty();
        let Some(tun) = tun.filter(|_| changes_container) else {
            return;
        };
        match self.device(endpoint, tun).release().await {
            // The container ended first, and with it all that was changed in it.
            Ok(()) | Err(Error::Tun(tailnode_tun::Error::Gone { .. })) => {}
            Err(error) => tracing::error!(
                container = endpoint.guest.container_name,
                network = endpoint.guest.network_name,
                "cannot put the container's own routes back: {error}"
            ),
        }
    }

    /// Stops the node of an endpoint, if there is one, also one that is only starting.
    pub(crate) async fn detach(self: &Arc<Self>, key: &Key) {
        let endpoint = {
            let mut state = self.state();
            if let Some(turn) = state.turns.get_mut(key) {
                turn.detached += 1;
            }
            state.endpoints.get(key).cloned()
        };
        if let Some(endpoint) = endpoint {
            self.release(&endpoint).await;
            self.end_within(endpoint, false, Instant::now() + DETACH)
                .await;
        }
    }

    /// The device of an endpoint, and how it should be set up now, if its node serves one.
    pub(crate) fn served(&self, key: &Key) -> Option<Served> {
        let endpoint = self.state().endpoints.get(key).cloned()?;
        let device = endpoint.device_name()?;
        let interface = self.wanted(&endpoint, endpoint.index().unwrap_or(0));
        Some(Served { device, interface })
    }

    /// Stops the nodes that CNI has attached to a network, but for those that are owned: container
    /// ids, with their network ids.
    pub(crate) async fn collect(self: &Arc<Self>, network: &str, owned: &[(String, String)]) {
        let is_orphan = |endpoint: &&Arc<Endpoint>| {
            let Guest {
                key, network_name, ..
            } = &endpoint.guest;
            let is_owned = |(id, network_id): &(String, String)| {
                *id == key.id && *network_id == key.network_id
            };
            key.engine == Engine::Cni && network_name == network && !owned.iter().any(is_owned)
        };
        let orphans: Vec<Key> = {
            let state = self.state();
            let orphans = state.endpoints.values().filter(is_orphan);
            orphans.map(|orphan| orphan.guest.key.clone()).collect()
        };
        let mut ends = JoinSet::new();
        for key in orphans {
            tracing::info!(
                container = key.id,
                network,
                "nobody owns this container's node"
            );
            let all = self.clone();
            ends.spawn(async move { all.detach(&key).await });
        }
        ends.join_all().await;
    }

    /// Stops a node whose container never learned of it.
    pub(crate) async fn undo(self: &Arc<Self>, ready: Ready) {
        self.end_within(ready.endpoint, true, Instant::now() + DETACH)
            .await;
    }

    /// Returns when there has been no node for a while, and none is on its way.
    pub(crate) async fn unused(&self) {
        let mut since = Instant::now();
        while since.elapsed() < UNUSED {
            tokio::time::sleep(UNUSED / 20).await;
            let state = self.state();
            if !state.endpoints.is_empty() || !state.turns.is_empty() {
                since = Instant::now();
            }
        }
    }

    /// Stops all nodes, for good.
    pub(crate) async fn close(self: &Arc<Self>) {
        let endpoints: Vec<_> = {
            let mut state = self.state();
            state.closed = true;
            state.endpoints.values().cloned().collect()
        };
        let mut ends = JoinSet::new();
        for endpoint in endpoints {
            let all = self.clone();
            ends.spawn(async move { all.end(endpoint, false).await });
        }
        ends.join_all().await;
    }

    /// Takes the nodes of the container of this name, or of an id that begins so, out of their
    /// tailnets.
    pub(crate) async fn logout(&self, container: &str) -> Result<(), Error> {
        let mut logouts = JoinSet::new();
        for endpoint in self.called(container)? {
            logouts.spawn(async move { endpoint.node.logout().await });
        }
        let outcomes = logouts.join_all().await;
        Ok(outcomes.into_iter().collect::<Result<(), _>>()?)
    }

    /// What holds for the container of this name, or of an id that begins so, on each of its
    /// networks, and who says so.
    pub(crate) fn explain(&self, container: &str) -> Result<Vec<Explained>, Error> {
        let mut list: Vec<_> = self
            .called(container)?
            .iter()
            .map(|it| it.explain())
            .collect();
        list.sort_by(|a, b| {
            (&a.container, a.engine, &a.network).cmp(&(&b.container, b.engine, &b.network))
        });
        Ok(list)
    }

    /// Those of the container of this name, or of an id that begins so: at least one.
    fn called(&self, container: &str) -> Result<Vec<Arc<Endpoint>>, Error> {
        let mut wanted: Vec<_> = self.state().endpoints.values().cloned().collect();
        wanted.retain(|endpoint| {
            let guest = &endpoint.guest;
            is_called(&guest.container_name, &guest.container_id, container)
        });
        match wanted.is_empty() {
            true => Err(Error::NoContainer {
                container: container.to_owned(),
            }),
            false => Ok(wanted),
        }
    }

    /// Removes a node that no container uses, and takes it out of its tailnet first unless only its
    /// state is to go.
    pub(crate) async fn forget(
        &self,
        node: &str,
        network: Option<&str>,
        local: bool,
    ) -> Result<Kept, Error> {
        let kept = self.identities.forget(node, network, local).await?;
        self.state().waiting.retain(|(status, _)| {
            status.network != kept.network || status.node.hostname != kept.hostname
        });
        Ok(kept)
    }

    /// All of them, and those that wait to be let in, by container and network.
    pub(crate) async fn status(&self) -> Vec<ContainerStatus> {
        let endpoints: Vec<_> = self.state().endpoints.values().cloned().collect();
        let mut list = Vec::new();
        for endpoint in endpoints {
            let status = endpoint.status().await;
            // It may have ended while we asked.
            if self.state().has(&endpoint) {
                list.push(status);
            }
        }
        let now = Instant::now();
        for (status, since) in &self.state().waiting {
            let place = |other: &ContainerStatus| (other.container.clone(), other.network.clone());
            if now < *since + WAITING && list.iter().all(|other| place(other) != place(status)) {
                list.push(status.clone());
            }
        }
        list.sort_by(|a, b| {
            (&a.container, a.engine, &a.network).cmp(&(&b.container, b.engine, &b.network))
        });
        list
    }

    /// Logs what to do for a running container that should have a node, if it has none.
    pub(crate) fn report_orphan(&self, engine: Engine, container_id: &str, name: &str) {
        if self.of_container(engine, container_id).is_empty() {
            tracing::warn!(
                "container {name} runs since before tailnoded started and has no tailnet until it \
                 is restarted: `{engine} restart {name}`"
            );
        }
    }

    async fn end_within(
        self: &Arc<Self>,
        endpoint: Arc<Endpoint>,
        failed: bool,
        deadline: Instant,
    ) {
        let all = self.clone();
        let name = endpoint.guest.container_name.clone();
        // A task of its own, which goes on when we stop waiting.
        let end = tokio::spawn(async move { all.end(endpoint, failed).await });
        match tokio::time::timeout_at(deadline, end).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(container = name, "stopping the node failed: {error}")
            }
            Err(_) => tracing::warn!(container = name, "the node takes its time to log out"),
        }
    }

    /// Takes an endpoint out and stops its node. Of several calls, one does it.
    async fn end(&self, endpoint: Arc<Endpoint>, failed: bool) {
        let guest = &endpoint.guest;
        {
            let mut state = self.state();
            if state.has(&endpoint) {
                state.endpoints.remove(&guest.key);
            }
            let network_id = &guest.key.network_id;
            if !state
                .endpoints
                .keys()
                .any(|key| key.network_id == *network_id)
            {
                state.segments.remove(network_id);
            }
        }
        endpoint.stop(failed).await;
        self.introduce(guest.key.engine, &guest.container_id).await;
    }

    /// Tells the nodes of one container of each other: each answers the others' names too.
    async fn introduce(&self, engine: Engine, container_id: &str) {
        let mut endpoints = self.of_container(engine, container_id);
        endpoints.sort_by_key(|endpoint| endpoint.index());
        for endpoint in &endpoints {
            let others: Vec<Zone> = endpoints
                .iter()
                .filter(|other| !Arc::ptr_eq(other, endpoint))
                .map(|other| other.node.zone())
                .collect();
            endpoint.node.set_siblings(others).await;
        }
    }

    fn of_container(&self, engine: Engine, container_id: &str) -> Vec<Arc<Endpoint>> {
        self.state()
            .endpoints
            .values()
            .filter(|endpoint| {
                endpoint.guest.key.engine == engine && endpoint.guest.container_id == container_id
            })
            .cloned()
            .collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Endpoint {
    async fn status(&self) -> ContainerStatus {
        let guest = &self.guest;
        ContainerStatus {
            container: guest.container_name.clone(),
            container_id: guest.container_id.clone(),
            engine: guest.key.engine,
            network: guest.network_name.clone(),
            interface: self.device_name().unwrap_or_default(),
            node: self.node.status().await,
        }
    }

    fn explain(&self) -> Explained {
        let guest = &self.guest;
        Explained {
            container: guest.container_name.clone(),
            container_id: guest.container_id.clone(),
            engine: guest.key.engine,
            network: guest.network_name.clone(),
            options: self.told.clone(),
        }
    }

    /// Whether the node lives and serves this very device.
    async fn serves(&self, tun: &Tun) -> bool {
        if self.held().identity.is_none() {
            return false;
        }
        let Some(own) = self.held().tun.clone() else {
            return false;
        };
        let Tun::Given(given) = tun else {
            return tailnode_tun::device_name(own.as_fd()).is_ok();
        };
        let Ok(given) = given.try_clone() else {
            return false;
        };
        blocking(move || {
            // Two live devices are in different namespaces or have different names.
            let place = |tun: &OwnedFd| {
                let netns = Netns::of_device(tun.as_fd()).ok()?.id();
                Some((netns, tailnode_tun::device_name(tun.as_fd()).ok()?))
            };
            place(&own).is_some_and(|own| place(&given) == Some(own))
        })
        .await
    }

    fn device_name(&self) -> Option<String> {
        let tun = self.held().tun.clone()?;
        tailnode_tun::device_name(tun.as_fd()).ok()
    }

    fn index(&self) -> Option<u32> {
        self.number
            .or_else(|| interface::index_of(&self.device_name()?))
    }

    /// Stops the node, and forgets it where nobody will want it again.
    async fn stop(&self, failed: bool) {
        let Held {
            tun,
            identity,
            keeper,
            joined: _,
        } = mem::take(&mut *self.held());
        if let Some(keeper) = keeper {
            keeper.abort();
        }
        drop(tun);
        let Some(identity) = identity else {
            return;
        };
        identity.ending();
        let login = self.node.status().await.login;
        // A person may be on the way to the login page or the admin console: the keys must be the
        // same when the container starts again.
        let awaited = matches!(login, Login::NeedsLogin { .. } | Login::NeedsApproval);
        let useless = failed && identity.fresh && !awaited;
        let forgotten = self.ephemeral || useless;
        self.node.stop(forgotten).await;
        tracing::info!(
            container = self.guest.container_name,
            network = self.guest.network_name,
            hostname = identity.hostname,
            forgotten,
            "stopped a node"
        );
        if forgotten {
            forget(identity).await;
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        lock(&self.held)
    }
}

/// Removes the state of an identity that is not going to be used again.
async fn forget(identity: Identity) {
    let directory = identity.directory.clone();
    let removed = blocking(move || tailnode_node::remove(&directory)).await;
    if let Err(error) = removed {
        tracing::warn!("cannot remove {}: {error}", identity.directory.display());
    }
}

/// Nothing is left half-changed under these locks, so a panic elsewhere does no harm.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[tokio::test]
    async fn a_container_that_is_detached_while_it_waits_gets_no_node() {
        let directory = tempfile::tempdir().unwrap();
        let all = Endpoints::new(
            directory.path().to_owned(),
            Layer::default(),
            Secrets::new("/nonexistent".into(), None, "/nonexistent".into()),
            Offload::All,
        )
        .unwrap();
        let all = Arc::new(all);
        let soon = Instant::now() + Duration::from_secs(60);
        let user = User {
            engine: Engine::Podman,
            container: "web".into(),
        };
        let before = all.identities.take("tailnet", "web", &user, None, soon);
        let before = before.await.unwrap();
        before.ending();
        let key = Key {
            engine: Engine::Podman,
            id: "ae48c7267541".into(),
            network_id: "7d2f".into(),
        };
        let guest = Guest {
            key: key.clone(),
            container_id: key.id.clone(),
            container_name: "web".into(),
            network_name: "tailnet".into(),
            exist: None,
            address: None,
            layers: Vec::new(),
        };
        let null = File::open("/dev/null").unwrap();
        let attach = all.attach(guest, Tun::Given(null.into()), soon);
        let (attached, ()) = tokio::join!(attach, async {
            all.detach(&key).await;
            drop(before);
        });
        let error = attached.err().unwrap();
        assert!(matches!(error, Error::Detached), "{error}");
        assert!(all.state().turns.is_empty() && all.state().endpoints.is_empty());
    }

    #[test]
    fn a_silent_control_server_is_waited_for_once_in_a_while() {
        let mut state = State::default();
        let (silent, other): (Url, Url) = (
            "https://silent.example".parse().unwrap(),
            "https://other.example".parse().unwrap(),
        );
        let unreachable = tailnode_node::Error::Unreachable {
            server: silent.clone(),
            seconds: 8,
            reason: "it does not answer".into(),
        };
        let long = Duration::from_secs(8);
        let now = Instant::now();
        assert_eq!(state.patience(&silent, now, now + long), long);
        state.heard(&silent, Some(&unreachable), now);
        assert_eq!(state.patience(&silent, now, now + long), SILENT_PATIENCE);
        assert_eq!(state.patience(&other, now, now + long), long);
        // Failing soon again does not put off the next long wait.
        let later = now + SILENT - Duration::from_secs(1);
        state.heard(&silent, Some(&unreachable), later);
        let later = now + SILENT;
        assert_eq!(state.patience(&silent, later, later + long), long);
        state.heard(&silent, Some(&unreachable), later);
        state.heard(&silent, None, later);
        assert_eq!(state.patience(&silent, later, later + long), long);
    }
}
