//! A small coordination server for Tailscale nodes, with a DERP relay and STUN in the same process.
//!
//! For one host, a LAN, CI or an air-gapped site: nodes join with an auth key or by approval at
//! the command line, get addresses and names, see those peers that a policy lets them talk to, and
//! reach each other directly or by the relay. `tailscaled` joins it as well as our own nodes do.
//! It is no replacement for Headscale or Tailscale: there is one tailnet, no web login, no Tailscale
//! SSH, Serve, Taildrop policy or tailnet lock.
//!
//! ```no_run
//! # async fn example() -> Result<(), tailnode_control_server::Error> {
//! use tailnode_control_server::{Config, KeySpec, Server};
//!
//! let server = Server::start(Config::new("/var/lib/tailnode-control")).await?;
//! let key = server.create_key(KeySpec { reusable: true, ..KeySpec::default() })?;
//! println!("tailscale up --login-server={} --auth-key={key}", server.url());
//! server.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! | module | what |
//! |---|---|
//! | `tailnet` | who has joined, by which right; names and addresses; no IO but the store's |
//! | `policy` | who may reach whom |
//! | `netmap` | what a node sees, and the difference to what it saw |
//! | `store` | SQLite |
//! | `machine` | `/machine/register`, `/machine/map` |
//! | `web` | the HTTP listener |
//! | `tls` | HTTPS |
//! | `relay` | DERP |
//! | [`admin`] | the command line's way in |

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use chrono::Utc;
use ipnet::IpNet;
use tailnode_wire::{
    stun,
    tailcfg::{DerpMap, DerpNode, DerpRegion, NodeId, RegionId},
};
use tokio::{
    net::{TcpSocket, UdpSocket},
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use url::Url;

pub mod admin;
mod machine;
mod netmap;
mod policy;
mod relay;
mod store;
mod tailnet;
mod tls;
mod web;

pub use policy::{Policy, PolicyError};
pub use store::AuthKey;
pub use tailnet::{KeySpec, Names, NodeSummary, RouteSummary};
pub use tls::TlsFiles;

use crate::{
    relay::Relay,
    store::Store,
    tailnet::{Site, Tailnet},
};

/// The DERP region that this server is; 900 to 999 are for private use (tailcfg/derpmap.go).
pub const DERP_REGION: RegionId = 900;
/// Suffix of all names, unless another is chosen; `internal` is reserved for such use by ICANN.
pub const DEFAULT_DOMAIN: &str = "tail.internal";

/// How a server is to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where HTTP listens; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where STUN listens; `None`: nowhere.
    pub stun: Option<SocketAddr>,
    /// How nodes reach the server; `None`: at the address that it listens on.
    pub url: Option<Url>,
    /// The state directory; made if need be.
    pub state: PathBuf,
    /// Suffix of all names.
    pub domain: String,
    /// The policy file; `None`: what `policy set` said last, or everything is allowed.
    pub policy: Option<PathBuf>,
    /// Names beyond those of the nodes.
    pub names: Names,
    /// The certificate to serve HTTPS with; `None`: plain HTTP.
    pub tls: Option<TlsFiles>,
    /// Further relays, in the form of `tailcfg.DERPMap`; `None`: this server is the only one.
    pub derp_map: Option<PathBuf>,
}

impl Config {
    /// On free ports of loopback, with everything allowed.
    pub fn new(state: impl Into<PathBuf>) -> Self {
        Self {
            listen: ([127, 0, 0, 1], 0).into(),
            stun: Some(([127, 0, 0, 1], 0).into()),
            url: None,
            state: state.into(),
            domain: DEFAULT_DOMAIN.to_owned(),
            policy: None,
            names: Names::default(),
            tls: None,
            derp_map: None,
        }
    }
}

/// What can go wrong; the message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state directory.
    #[error("state directory {}: {source}; give another with --state", dir.display())]
    StateDir {
        /// Which.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The database.
    #[error("the state cannot be read or written: {0}")]
    Store(#[from] rusqlite::Error),
    /// The state is a later version's.
    #[error("{} has version {version}, which this version does not know: update it", path.display())]
    NewerState {
        /// The database.
        path: PathBuf,
        /// Its version.
        version: i64,
    },
    /// The state has something that no version wrote.
    #[error("the state is damaged ({0}): restore it from a backup")]
    Damaged(String),
    /// An address is taken, or not ours.
    #[error("cannot listen on {addr}: {source}")]
    Listen {
        /// Which.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The server runs, but not well.
    #[error("{0}")]
    Serve(io::Error),
    /// The URL that nodes are to use.
    #[error("the server's URL is not valid: {0}; give it as --url http://HOST:PORT")]
    Url(url::ParseError),
    /// The URL has no host.
    #[error("the server's URL {0} has no host; give it as --url http://HOST:PORT")]
    NoHost(Url),
    /// The URL says plain HTTP.
    #[error(
        "the server's URL {0} is for plain http, but it has a certificate; give it as --url https://HOST:PORT"
    )]
    NotHttps(Url),
    /// The certificate or its key.
    #[error("TLS file {}: {reason}; --tls-cert and --tls-key name PEM files that belong together", path.display())]
    Tls {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The map of further relays.
    #[error("DERP map {}: {reason}; it should look like {{\"Regions\": {{\"901\": {{\"RegionID\": 901, \"RegionCode\": \"fra\", \"Nodes\": [{{\"Name\": \"901a\", \"RegionID\": 901, \"HostName\": \"derp.example.com\"}}]}}}}}}", path.display())]
    DerpMap {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The policy file.
    #[error("policy file {}: {source}", path.display())]
    PolicyFile {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// `policy set` while a file rules.
    #[error("the server reads its policy from a file: change that, and send the server SIGHUP")]
    PolicyIsAFile,
    /// A message is not what it should be.
    #[error("the request cannot be read: {0}")]
    Request(serde_json::Error),
    /// The running server's socket.
    #[error("the running server does not answer on its admin socket: {0}")]
    Admin(io::Error),
    /// The running server says no.
    #[error("{0}")]
    Refused(String),
    /// No node of that number.
    #[error("there is no node {id}; `tailnode-control node list` shows them")]
    NoNode {
        /// The number.
        id: NodeId,
    },
    /// Not a name for a node.
    #[error("{name:?} is not a host name; write it with small letters, digits and dashes")]
    BadName {
        /// What was given.
        name: String,
    },
    /// A name that another node has.
    #[error("{name:?} is the name of node {by}; give that another first")]
    NameTaken {
        /// What was given.
        name: String,
        /// Whose it is.
        by: NodeId,
    },
    /// No node waits there.
    #[error("no node waits under {id:?}; the node shows the right one when it asks to log in")]
    NoPending {
        /// What was given.
        id: String,
    },
    /// No auth key of that name.
    #[error("there is no auth key {id:?}; `tailnode-control key list` shows them")]
    NoKey {
        /// What was given.
        id: String,
    },
    /// Not a tag.
    #[error("{tag:?} is not a tag; write it tag:name, with letters, digits and dashes")]
    BadTag {
        /// What was given.
        tag: String,
    },
    /// Not a login name.
    #[error("{user:?} is not a login name; write it name@domain")]
    BadUser {
        /// What was given.
        user: String,
    },
    /// A node asks for a tag that is not its owner's to give.
    #[error("{tag} is not {user}'s to give: name them under tagOwners in the policy")]
    TagNotOwned {
        /// The tag.
        tag: String,
        /// Who would own the node.
        user: String,
    },
    /// A route to approve that the node does not offer.
    #[error(
        "node {id} does not offer the route {route}; it offers {}",
        listed(offered)
    )]
    RouteNotOffered {
        /// The node.
        id: NodeId,
        /// What was to be approved.
        route: IpNet,
        /// What could be.
        offered: Vec<IpNet>,
    },
    /// All addresses are taken.
    #[error("all addresses of 100.64.0.0/10 are taken; delete nodes that are gone")]
    NoAddress,
}

fn listed(routes: &[IpNet]) -> String {
    if routes.is_empty() {
        return "none".to_owned();
    }
    let routes: Vec<_> = routes.iter().map(ToString::to_string).collect();
    routes.join(", ")
}

/// Connections that may wait to be taken.
const BACKLOG: u32 = 1024;

/// A running server; it ends when this is dropped.
pub struct Server {
    url: Url,
    stun: Option<SocketAddr>,
    policy: Option<PathBuf>,
    site: Arc<web::Site>,
    /// Those that accept; the connections are in `site.tasks`.
    tasks: JoinSet<()>,
}

impl Server {
    /// Starts a server; it serves once this returns.
    pub async fn start(config: Config) -> Result<Self, Error> {
        let listen = |addr| move |source| Error::Listen { addr, source };
        let store = Store::open(&config.state)?;
        let identity = store.identity()?;
        let policy = config.policy.as_deref().map(read_policy).transpose()?;
        let tls = config.tls.as_ref().map(tls::acceptor).transpose()?;

        let http = bind(config.listen).map_err(listen(config.listen))?;
        let http_addr = http.local_addr().map_err(Error::Serve)?;
        let stun = match config.stun {
            Some(addr) => Some(UdpSocket::bind(addr).await.map_err(listen(addr))?),
            None => None,
        };
        let stun_addr = stun
            .as_ref()
            .map(UdpSocket::local_addr)
            .transpose()
            .map_err(Error::Serve)?;
        let url = match config.url {
            Some(url) => url,
            None => {
                let scheme = if tls.is_some() { "https" } else { "http" };
                let url = format!("{scheme}://{http_addr}");
                url.parse().map_err(Error::Url)?
            }
        };
        if tls.is_some() && url.scheme() == "http" {
            return Err(Error::NotHttps(url));
        }
        let mut derp_map = derp_map(&url, stun_addr)?;
        if let Some(path) = &config.derp_map {
            add_regions(&mut derp_map, path)?;
        }
        let domain = config.domain.trim_matches('.').to_ascii_lowercase();
        store.set_domain(&domain)?;
        let tailnet_site = Site {
            url: url.clone(),
            domain,
            derp_map,
            names: config.names,
        };
        let tailnet = Arc::new(Tailnet::open(store, tailnet_site, policy)?);
        let admin = admin::listen(&config.state).map_err(|source| Error::StateDir {
            dir: config.state.clone(),
            source,
        })?;
        // Not before: who finds the port open finds the administrator's socket, too. Without that,
        // the command line changes the state itself, and the server does not learn of it.
        let http = http.listen(BACKLOG).map_err(listen(config.listen))?;

        let site = Arc::new(web::Site {
            tailnet: Arc::clone(&tailnet),
            relay: Relay::new(identity.derp),
            machine: identity.machine,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(web::serve(http, tls, Arc::clone(&site)));
        tasks.spawn(admin::serve(
            admin,
            Arc::clone(&tailnet),
            config.policy.is_some(),
        ));
        tasks.spawn(machine::reap(tailnet));
        if let Some(stun) = stun {
            tasks.spawn(reflect(stun));
        }
        Ok(Self {
            url,
            stun: stun_addr,
            policy: config.policy,
            site,
            tasks,
        })
    }

    /// How nodes reach it: their login server.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Where STUN listens.
    pub fn stun(&self) -> Option<SocketAddr> {
        self.stun
    }

    /// Makes an auth key and returns it.
    pub fn create_key(&self, spec: KeySpec) -> Result<String, Error> {
        self.site.tailnet.state().create_key(spec, Utc::now())
    }

    /// All nodes, in the order in which they joined.
    pub fn nodes(&self) -> Vec<NodeSummary> {
        self.site.tailnet.state().nodes()
    }

    /// Lets the node in whose AuthURL ends in `id`.
    pub fn approve(&self, id: &str) -> Result<NodeId, Error> {
        self.site
            .tailnet
            .change(|state| state.approve(id, None, Utc::now()))
    }

    /// Makes a node log in again.
    pub fn expire_node(&self, id: NodeId) -> Result<(), Error> {
        self.site
            .tailnet
            .change(|state| state.expire(id, Utc::now()))
    }

    /// Forgets a node.
    pub fn delete_node(&self, id: NodeId) -> Result<(), Error> {
        self.site.tailnet.change(|state| state.remove(id))
    }

    /// Enforces another policy from now on.
    pub fn set_policy(&self, policy: Policy) {
        self.site.tailnet.state().policy = policy;
        self.site.tailnet.changed();
    }

    /// Reads the policy file again; on an error the old policy stays. Without a file, nothing.
    pub fn reload_policy(&self) -> Result<(), Error> {
        if let Some(path) = &self.policy {
            self.set_policy(read_policy(path)?);
        }
        Ok(())
    }

    /// Ends the server and all its connections.
    pub async fn shutdown(mut self) {
        self.tasks.shutdown().await;
        self.site.stop.cancel();
        self.site.tasks.close();
        self.site.tasks.wait().await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.site.stop.cancel();
    }
}

/// Takes the address without listening there yet.
fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // As tokio's listeners do: a restart need not wait for old connections' ends.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// Reads and checks a policy file.
pub fn read_policy(path: &Path) -> Result<Policy, Error> {
    let unreadable = |source| Error::PolicyFile {
        path: path.to_owned(),
        source,
    };
    Ok(std::fs::read_to_string(path).map_err(unreadable)?.parse()?)
}

/// One region with one server: this one.
fn derp_map(url: &Url, stun: Option<SocketAddr>) -> Result<DerpMap, Error> {
    let host = url.host().ok_or_else(|| Error::NoHost(url.clone()))?;
    let mut node = DerpNode {
        name: format!("{DERP_REGION}a"),
        region_id: DERP_REGION,
        derp_port: url.port_or_known_default().unwrap_or_default(),
        stun_port: stun.map_or(-1, |addr| addr.port().into()),
        can_port80: url.scheme() == "http",
        ..DerpNode::default()
    };
    match host {
        url::Host::Domain(name) => node.host_name = name.to_owned(),
        url::Host::Ipv4(ip) => {
            node.host_name = ip.to_string();
            node.ipv4 = ip.to_string();
            node.ipv6 = "none".to_owned();
        }
        url::Host::Ipv6(ip) => {
            node.host_name = ip.to_string();
            node.ipv6 = ip.to_string();
            node.ipv4 = "none".to_owned();
        }
    }
    let region = DerpRegion {
        region_id: DERP_REGION,
        region_code: "tailnode".to_owned(),
        region_name: "tailnode-control".to_owned(),
        nodes: vec![node],
        ..DerpRegion::default()
    };
    Ok(DerpMap {
        regions: [(DERP_REGION, region)].into(),
        omit_default_regions: true,
    })
}

/// Adds the regions of a file to those of the map. It is read as Tailscale's policy reads its
/// `derpMap`: a region replaces ours of the same number, and `OmitDefaultRegions` leaves ours out.
fn add_regions(map: &mut DerpMap, path: &Path) -> Result<(), Error> {
    let bad = |reason: String| Error::DerpMap {
        path: path.to_owned(),
        reason,
    };
    let text = std::fs::read_to_string(path).map_err(|error| bad(error.to_string()))?;
    let further: DerpMap =
        serde_json::from_str(&policy::to_json(&text)).map_err(|error| bad(error.to_string()))?;
    if further.regions.is_empty() {
        return Err(bad("it has no Regions".into()));
    }
    for (id, region) in &further.regions {
        let wrong = |what: &str| Err(bad(format!("region {id} {what}")));
        if region.region_id != *id {
            return wrong("has another number as its RegionID");
        }
        if region.nodes.is_empty() {
            return wrong("has no Nodes");
        }
        if region.nodes.iter().any(|node| node.host_name.is_empty()) {
            return wrong("has a node without HostName");
        }
    }
    if further.omit_default_regions {
        map.regions.clear();
    }
    map.regions.extend(further.regions);
    Ok(())
}

/// Tells everyone who asks by STUN where the question came from.
async fn reflect(socket: UdpSocket) {
    let mut packet = [0; 1500];
    loop {
        let answered = async {
            let (len, from) = socket.recv_from(&mut packet).await?;
            if let Ok(tx_id) = stun::parse_request(&packet[..len]) {
                socket.send_to(&stun::response(&tx_id, from), from).await?;
            }
            io::Result::Ok(())
        };
        if let Err(error) = answered.await {
            // One answer that cannot be sent is no reason to stop.
            tracing::debug!("STUN: {error}");
        }
    }
}
