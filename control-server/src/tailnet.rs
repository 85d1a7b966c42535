//! The tailnet: who has joined, by which right, and what each node is to see of it.
//!
//! No sockets and no clock: the time is passed in, and every change wakes those who wait in
//! [`Tailnet::changes`].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use chrono::{DateTime, Utc};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tailnode_wire::{
    CAPABILITY_VERSION,
    keys::{MachinePublicKey, NodePublicKey},
    tailcfg::{
        DerpMap, Hostinfo, Login, MapRequest, NodeId, RegisterRequest, RegisterResponse, User,
        UserId,
    },
};
use tokio::sync::watch;
use url::Url;

use crate::{
    Error,
    netmap::{Census, primary_routes},
    policy::{Policy, Subject, is_tag},
    store::{AuthKey, Member, Store},
};

/// Shown as the owner of every tagged node, as Tailscale does.
pub(crate) const TAGGED_OWNER: &str = "tagged-devices";
/// Bounds what strangers can make the server remember; the oldest goes first.
const MAX_PENDING: usize = 256;
/// CGNAT, RFC 6598: where Tailscale's addresses are.
const FIRST_IPV4: u32 = u32::from_be_bytes([100, 64, 0, 0]);
const LAST_IPV4: u32 = u32::from_be_bytes([100, 127, 255, 255]);
/// Taken by MagicDNS and by ChromeOS (net/tsaddr of the reference implementation).
const RESERVED: [(Ipv4Addr, u8); 2] = [
    (Ipv4Addr::new(100, 100, 100, 0), 24),
    (Ipv4Addr::new(100, 115, 92, 0), 23),
];
/// Tailscale's ULA prefix (net/tsaddr).
const IPV6_PREFIX: [u16; 3] = [0xfd7a, 0x115c, 0xa1e0];

const NEXT_IPV4: &str = "next_ipv4";
const POLICY: &str = "policy";

/// What a new auth key is to be.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct KeySpec {
    /// It admits any number of nodes.
    pub reusable: bool,
    /// Its nodes are removed when they are gone.
    pub ephemeral: bool,
    /// Its nodes get these tags, written `tag:name`.
    pub tags: BTreeSet<String>,
    /// It ends then; `None`: never.
    pub expires: Option<DateTime<Utc>>,
    /// Login name of its nodes' owner; `None`: `user@DOMAIN`.
    pub user: Option<String>,
}

/// A node, as an administrator sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeSummary {
    /// Its number.
    pub id: NodeId,
    /// Its MagicDNS name, without a dot at the end.
    pub name: String,
    /// IPv4, then IPv6.
    pub addresses: Vec<IpAddr>,
    /// Its owner's login name.
    pub user: String,
    /// Its tags.
    pub tags: BTreeSet<String>,
    /// It is connected now.
    pub online: bool,
    /// It is removed when it is gone.
    pub ephemeral: bool,
    /// It must log in again.
    pub expired: bool,
    /// When it was connected or seen last.
    pub last_seen: DateTime<Utc>,
    /// What it offers to route.
    pub routes: Vec<RouteSummary>,
}

/// A route that a node offers, as an administrator sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RouteSummary {
    /// The subnet; `0.0.0.0/0` and `::/0`: it is an exit.
    pub route: IpNet,
    /// By an administrator or by the policy.
    pub approved: bool,
    /// Of those that may route this subnet, it is the node that does. Every exit is one by itself.
    pub primary: bool,
}

/// What does not change while the server runs.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    /// How nodes reach the server.
    pub url: Url,
    /// Suffix of all names, without dots around it.
    pub domain: String,
    pub derp_map: DerpMap,
    pub names: Names,
}

/// What the tailnet's DNS knows beyond the names of its nodes.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// Full names and their addresses.
    pub records: Vec<(String, IpAddr)>,
    /// The DNS servers to ask for a zone's names.
    pub split: BTreeMap<String, Vec<IpAddr>>,
}

pub(crate) struct Tailnet {
    state: Mutex<State>,
    changes: watch::Sender<()>,
}

/// Names a map stream; a newer one of the same node ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StreamId(u64);

/// What is to become of a registration.
#[derive(Debug)]
pub(crate) enum Registration {
    /// This is the answer.
    Done(RegisterResponse),
    /// Ask again when something changes: a person has to approve it.
    Wait,
}

pub(crate) struct State {
    store: Store,
    pub site: Site,
    pub policy: Policy,
    pub members: BTreeMap<NodeId, Member>,
    /// The map stream of each node; `None`: it had one.
    streams: HashMap<NodeId, Option<StreamId>>,
    last_stream: u64,
    /// By the last part of their AuthURL.
    pending: BTreeMap<String, Pending>,
    users: BTreeMap<String, UserId>,
    /// What all views are made of, until something changes.
    census: Option<Arc<Census>>,
}

/// A node that waits for approval.
struct Pending {
    machine: MachinePublicKey,
    request: RegisterRequest,
    since: DateTime<Utc>,
}

/// By what right a node joins.
struct Right {
    user: String,
    tags: BTreeSet<String>,
    ephemeral: bool,
}

impl Tailnet {
    /// `policy`: from a file; without one, that of `policy set`, or everything is allowed.
    pub fn open(store: Store, site: Site, policy: Option<Policy>) -> Result<Self, Error> {
        let policy = match (policy, store.setting(POLICY)?) {
            (Some(policy), _) => policy,
            (None, Some(text)) => text.parse()?,
            (None, None) => Policy::default(),
        };
        let state = State {
            members: store.members()?,
            store,
            site,
            policy,
            streams: HashMap::new(),
            last_stream: 0,
            pending: BTreeMap::new(),
            users: BTreeMap::new(),
            census: None,
        };
        Ok(Self {
            state: Mutex::new(state),
            changes: watch::Sender::new(()),
        })
    }

    /// Wakes at every change.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// A look at, or a change of, the state; a change must be followed by [`Self::changed`].
    pub fn state(&self) -> MutexGuard<'_, State> {
        // A panic in between leaves the state as good as the store, which has every change first.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells all streams to look again.
    pub fn changed(&self) {
        self.state().census = None;
        self.changes.send_replace(());
    }

    /// Runs `change` and wakes the streams if it went well.
    pub fn change<T>(
        &self,
        change: impl FnOnce(&mut State) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let done = change(&mut self.state())?;
        self.changed();
        Ok(done)
    }
}

impl Site {
    fn default_user(&self) -> String {
        format!("user@{}", self.domain)
    }
}

// Joining and leaving.
impl State {
    /// Answers `/machine/register` of `machine`.
    pub fn register(
        &mut self,
        machine: &MachinePublicKey,
        request: &RegisterRequest,
        now: DateTime<Utc>,
    ) -> Result<Registration, Error> {
        if request.version < CAPABILITY_VERSION {
            return Ok(refuse(format!(
                "this node's Tailscale is too old for the control server (capability version \
                 {}, at least {CAPABILITY_VERSION} is needed): update it",
                request.version
            )));
        }
        let logout = request
            .expiry
            .is_some_and(|at| at.timestamp() > 0 && at <= now);
        let hostinfo = request.hostinfo.clone().unwrap_or_default();
        let by_key = |key: &NodePublicKey| self.members.values().find(|m| m.key == *key).cloned();

        if let Some(mut member) = by_key(&request.node_key) {
            if member.machine != *machine {
                return Ok(refuse(
                    "this node key belongs to another machine: remove the node's state, so that \
                     it makes keys of its own"
                        .to_owned(),
                ));
            }
            if logout {
                if member.ephemeral {
                    self.remove(member.id)?;
                } else {
                    self.expire(member.id, now)?;
                }
                let answer = RegisterResponse {
                    node_key_expired: true,
                    ..Default::default()
                };
                return Ok(Registration::Done(answer));
            }
            if member.expired.is_none() {
                self.rename(&mut member, &hostinfo.hostname);
                member.hostinfo = hostinfo;
                let answer = self.welcome(&member)?;
                self.keep(member)?;
                return Ok(answer);
            }
        }
        if logout {
            // The node is gone already, which is what it wants.
            return Ok(Registration::Done(RegisterResponse::default()));
        }

        // A machine that comes back with another node key is still the same node.
        let known = self
            .members
            .values()
            .find(|m| m.machine == *machine)
            .cloned();
        let rotates = known.as_ref().is_some_and(|member| {
            member.expired.is_none() && request.old_node_key == Some(member.key)
        });
        let right = if let Some(auth) = request.auth.as_ref().filter(|a| !a.auth_key.is_empty()) {
            match self.redeem(&auth.auth_key, &hostinfo.request_tags, now)? {
                Ok(right) => right,
                Err(why) => return Ok(refuse(why)),
            }
        } else if let (true, Some(member)) = (rotates, &known) {
            Right {
                user: member.user.clone(),
                tags: member.tags.clone(),
                ephemeral: member.ephemeral,
            }
        } else if known
            .as_ref()
            .is_some_and(|member| member.key == request.node_key)
            && request.followup.is_empty()
        {
            // An expired key: the node has to make a new one before anyone can approve it.
            let answer = RegisterResponse {
                node_key_expired: true,
                ..Default::default()
            };
            return Ok(Registration::Done(answer));
        } else {
            return Ok(self.wait_for_approval(machine, request, now));
        };
        let member = self.admit(machine, request, right, now)?;
        self.welcome(&member)
    }

    /// Adds the node, or renews the one that this machine was.
    fn admit(
        &mut self,
        machine: &MachinePublicKey,
        request: &RegisterRequest,
        right: Right,
        now: DateTime<Utc>,
    ) -> Result<Member, Error> {
        let hostinfo = request.hostinfo.clone().unwrap_or_default();
        let known = self
            .members
            .values()
            .find(|m| m.machine == *machine)
            .cloned();
        let mut member = match known {
            Some(member) => member,
            None => Member {
                id: 0,
                machine: *machine,
                key: request.node_key,
                disco: None,
                wanted_name: String::new(),
                name: String::new(),
                ipv4: self.next_ipv4()?,
                user: String::new(),
                tags: BTreeSet::new(),
                ephemeral: false,
                created: now,
                last_seen: now,
                expired: None,
                version: request.version,
                hostinfo: Hostinfo::default(),
                endpoints: Vec::new(),
                home_derp: 0,
                approved_routes: BTreeSet::new(),
            },
        };
        self.rename(&mut member, &hostinfo.hostname);
        member.key = request.node_key;
        member.version = request.version;
        member.expired = None;
        member.user = right.user;
        member.tags = right.tags;
        member.ephemeral = right.ephemeral || request.ephemeral;
        member.hostinfo = hostinfo;
        if member.id == 0 {
            self.store.add_member(&mut member)?;
        }
        self.keep(member.clone())?;
        tracing::info!(node = member.id, name = member.name, "node joined");
        Ok(member)
    }

    fn welcome(&mut self, member: &Member) -> Result<Registration, Error> {
        let login = owner(member).to_owned();
        let id = self.user_id(&login)?;
        Ok(Registration::Done(RegisterResponse {
            user: User {
                id,
                display_name: login.clone(),
            },
            login: Login {
                id,
                provider: String::new(),
                login_name: login.clone(),
                display_name: login,
            },
            machine_authorized: true,
            ..RegisterResponse::default()
        }))
    }

    /// The right that an auth key gives, or why it gives none. A one-off key is used up by this.
    fn redeem(
        &mut self,
        text: &str,
        wanted: &[String],
        now: DateTime<Utc>,
    ) -> Result<Result<Right, String>, Error> {
        const ANOTHER: &str = "create another with `tailnode-control key create`";
        let parts = text
            .strip_prefix("tnkey-")
            .and_then(|rest| rest.split_once('-'));
        let key = match parts {
            Some((id, secret)) => self.store.key(id)?.filter(|key| key.hash == hash(secret)),
            None => None,
        };
        let Some(mut key) = key else {
            return Ok(Err(format!(
                "auth key is not known to this control server: {ANOTHER}"
            )));
        };
        if let Some(expires) = key.expires.filter(|expires| *expires <= now) {
            let at = expires.format("%F %T UTC");
            return Ok(Err(format!(
                "auth key {} has expired at {at}: {ANOTHER}",
                key.id
            )));
        }
        if key.used && !key.reusable {
            return Ok(Err(format!(
                "auth key {} was for one node and is used up: {ANOTHER}, with --reusable for \
                 several nodes",
                key.id
            )));
        }
        for tag in wanted {
            if !key.tags.contains(tag) && !self.policy.owns_tag(&key.user, &key.tags, tag) {
                return Ok(Err(format!(
                    "tag {tag:?} may not be taken with auth key {}: create one with \
                     `tailnode-control key create --tag {tag}`, or name {} under tagOwners in \
                     the policy",
                    key.id, key.user
                )));
            }
        }
        if !key.used {
            key.used = true;
            self.store.put_key(&key)?;
        }
        let tags = key.tags.into_iter().chain(wanted.iter().cloned()).collect();
        Ok(Ok(Right {
            user: key.user,
            tags,
            ephemeral: key.ephemeral,
        }))
    }

    fn wait_for_approval(
        &mut self,
        machine: &MachinePublicKey,
        request: &RegisterRequest,
        now: DateTime<Utc>,
    ) -> Registration {
        let same = |pending: &Pending| {
            pending.machine == *machine && pending.request.node_key == request.node_key
        };
        let known = self.pending.iter().find(|(_, pending)| same(pending));
        let known = known.map(|(id, _)| id.clone());
        if known.is_some() && !request.followup.is_empty() {
            return Registration::Wait;
        }
        let id = known.unwrap_or_else(|| {
            if self.pending.len() >= MAX_PENDING {
                let oldest = self.pending.iter().min_by_key(|(_, pending)| pending.since);
                if let Some(id) = oldest.map(|(id, _)| id.clone()) {
                    self.pending.remove(&id);
                }
            }
            let id = hex(&rand::random::<[u8; 8]>());
            let request = RegisterRequest {
                auth: None,
                ..request.clone()
            };
            self.pending.insert(
                id.clone(),
                Pending {
                    machine: *machine,
                    request,
                    since: now,
                },
            );
            tracing::info!("a node waits for `tailnode-control node approve {id}`");
            id
        });
        Registration::Done(RegisterResponse {
            auth_url: format!(
                "{}/register/{id}",
                self.site.url.as_str().trim_end_matches('/')
            ),
            ..RegisterResponse::default()
        })
    }

    /// The host name of a node that waits under `id`.
    pub fn pending(&self, id: &str) -> Option<&str> {
        let hostinfo = self.pending.get(id)?.request.hostinfo.as_ref();
        Some(hostinfo.map_or("", |hostinfo| &hostinfo.hostname))
    }

    /// Lets the node in that waits under `id`; it will be `user`'s.
    pub fn approve(
        &mut self,
        id: &str,
        user: Option<String>,
        now: DateTime<Utc>,
    ) -> Result<NodeId, Error> {
        let pending = self
            .pending
            .get(id)
            .ok_or_else(|| Error::NoPending { id: id.to_owned() })?;
        let user = self.check_user(user)?;
        let wanted = pending
            .request
            .hostinfo
            .iter()
            .flat_map(|info| &info.request_tags);
        let tags: BTreeSet<String> = wanted.cloned().collect();
        if let Some(tag) = tags
            .iter()
            .find(|tag| !self.policy.owns_tag(&user, &BTreeSet::new(), tag))
        {
            return Err(Error::TagNotOwned {
                tag: tag.clone(),
                user,
            });
        }
        let (machine, request) = (pending.machine, pending.request.clone());
        let right = Right {
            user,
            tags,
            ephemeral: false,
        };
        let member = self.admit(&machine, &request, right, now)?;
        self.pending.remove(id);
        Ok(member.id)
    }

    /// Ends the node's key: it has to log in again.
    pub fn expire(&mut self, id: NodeId, now: DateTime<Utc>) -> Result<(), Error> {
        let mut member = self.members.get(&id).cloned().ok_or(Error::NoNode { id })?;
        member.expired = Some(now);
        self.keep(member)
    }

    /// Forgets the node.
    pub fn remove(&mut self, id: NodeId) -> Result<(), Error> {
        if !self.members.contains_key(&id) {
            return Err(Error::NoNode { id });
        }
        self.store.remove_member(id)?;
        self.members.remove(&id);
        self.streams.remove(&id);
        tracing::info!(node = id, "node removed");
        Ok(())
    }

    fn keep(&mut self, member: Member) -> Result<(), Error> {
        self.store.put_member(&member)?;
        self.members.insert(member.id, member);
        Ok(())
    }

    /// Gives a node the name that an administrator chose; it keeps it until it asks for another.
    pub fn call(&mut self, id: NodeId, name: &str) -> Result<(), Error> {
        let mut member = self.members.get(&id).cloned().ok_or(Error::NoNode { id })?;
        if dns_label(name) != name {
            return Err(Error::BadName {
                name: name.to_owned(),
            });
        }
        let namesake = |other: &&Member| other.id != id && other.name == name;
        if let Some(other) = self.members.values().find(namesake) {
            return Err(Error::NameTaken {
                name: name.to_owned(),
                by: other.id,
            });
        }
        name.clone_into(&mut member.name);
        self.keep(member)
    }

    /// A node keeps its name until it wants another.
    fn rename(&self, member: &mut Member, hostname: &str) {
        let wanted = dns_label(hostname);
        if wanted == member.wanted_name {
            return;
        }
        let taken: BTreeSet<&str> = self
            .members
            .values()
            .filter(|other| other.id != member.id)
            .map(|other| other.name.as_str())
            .collect();
        let mut name = wanted.clone();
        for n in 1.. {
            if !taken.contains(name.as_str()) {
                break;
            }
            let suffix = format!("-{n}");
            let room = wanted.len().min(63 - suffix.len());
            name = format!("{}{suffix}", &wanted[..room]);
        }
        member.name = name;
        member.wanted_name = wanted;
    }

    /// In turn, so that an address is not given to another as soon as its node is gone; from a place
    /// of the tailnet's own, so that a container in two tailnets seldom finds one address in both.
    fn next_ipv4(&mut self) -> Result<Ipv4Addr, Error> {
        let stored = self
            .store
            .setting(NEXT_IPV4)?
            .and_then(|text| text.parse::<Ipv4Addr>().ok());
        let start = stored.map_or_else(|| rand::random_range(FIRST_IPV4 + 1..LAST_IPV4), u32::from);
        let taken: BTreeSet<u32> = self.members.values().map(|m| m.ipv4.into()).collect();
        let next = |ip: u32| {
            if ip < LAST_IPV4 - 1 {
                ip + 1
            } else {
                FIRST_IPV4 + 1
            }
        };
        let mut ip = start;
        while taken.contains(&ip) || is_reserved(ip.into()) {
            ip = next(ip);
            if ip == start {
                return Err(Error::NoAddress);
            }
        }
        self.store
            .set_setting(NEXT_IPV4, &Ipv4Addr::from(next(ip)).to_string())?;
        Ok(ip.into())
    }

    /// The number of the user of that login name.
    pub fn user_id(&mut self, login: &str) -> Result<UserId, Error> {
        if let Some(id) = self.users.get(login) {
            return Ok(*id);
        }
        let id = self.store.user_id(login)?;
        self.users.insert(login.to_owned(), id);
        Ok(id)
    }

    fn check_user(&self, user: Option<String>) -> Result<String, Error> {
        let user = user.unwrap_or_else(|| self.site.default_user());
        if user.contains('@') {
            Ok(user)
        } else {
            Err(Error::BadUser { user })
        }
    }
}

// What nodes tell, and whether they are there.
impl State {
    /// The node that a map request comes from, if its machine may speak for it.
    pub fn caller(&self, machine: &MachinePublicKey, key: &NodePublicKey) -> Option<NodeId> {
        let member = self
            .members
            .values()
            .find(|m| m.key == *key && m.machine == *machine)?;
        Some(member.id)
    }

    /// Whether a node of the tailnet has this key; the relay serves no others.
    pub fn has_key(&self, key: &NodePublicKey) -> bool {
        self.members
            .values()
            .any(|m| m.key == *key && m.expired.is_none())
    }

    /// Takes over what a map request tells; false: nothing new.
    pub fn update(&mut self, id: NodeId, request: &MapRequest) -> Result<bool, Error> {
        let before = self.members.get(&id).ok_or(Error::NoNode { id })?;
        let mut member = before.clone();
        member.disco = Some(request.disco_key);
        member.version = request.version;
        // Since version 68 a stream only reads (tailcfg.MapRequest.Stream).
        if !request.stream && !request.read_only {
            member.endpoints.clone_from(&request.endpoints);
            if let Some(hostinfo) = &request.hostinfo {
                self.rename(&mut member, &hostinfo.hostname);
                // An update without network report says nothing of the home relay.
                if let Some(net_info) = &hostinfo.net_info {
                    member.home_derp = net_info.preferred_derp;
                }
                member.hostinfo = hostinfo.clone();
            }
        }
        if member == *before {
            return Ok(false);
        }
        self.keep(member)?;
        Ok(true)
    }

    /// A map stream of the node begins; an older one ends by this.
    pub fn connect(&mut self, id: NodeId, now: DateTime<Utc>) -> Result<StreamId, Error> {
        let member = self.members.get(&id).cloned().ok_or(Error::NoNode { id })?;
        self.keep(Member {
            last_seen: now,
            ..member
        })?;
        self.last_stream += 1;
        let stream = StreamId(self.last_stream);
        self.streams.insert(id, Some(stream));
        Ok(stream)
    }

    /// Whether the stream is still the node's.
    pub fn is_current(&self, id: NodeId, stream: StreamId) -> bool {
        self.streams.get(&id) == Some(&Some(stream))
    }

    pub fn is_online(&self, id: NodeId) -> bool {
        self.streams.get(&id).is_some_and(Option::is_some)
    }

    /// A map stream has ended; false: a newer one has replaced it, and the node is still there.
    pub fn disconnect(
        &mut self,
        id: NodeId,
        stream: StreamId,
        now: DateTime<Utc>,
    ) -> Result<bool, Error> {
        if !self.is_current(id, stream) {
            return Ok(false);
        }
        self.streams.insert(id, None);
        if let Some(mut member) = self.members.get(&id).cloned() {
            member.last_seen = now;
            self.keep(member)?;
        }
        Ok(true)
    }

    /// Ephemeral nodes that have no stream, and whether they had one since the server's start.
    pub fn absent(&self) -> BTreeMap<NodeId, bool> {
        let absent = |m: &&Member| m.ephemeral && !self.is_online(m.id);
        let absent = self.members.values().filter(absent);
        absent
            .map(|m| (m.id, self.streams.contains_key(&m.id)))
            .collect()
    }

    /// All nodes as they are now.
    pub fn census(&mut self) -> Result<Arc<Census>, Error> {
        if let Some(census) = &self.census {
            return Ok(Arc::clone(census));
        }
        let census = Arc::new(Census::take(self)?);
        self.census = Some(Arc::clone(&census));
        Ok(census)
    }

    /// What the policy needs to know of a node; its routes are those that are approved.
    pub fn subject(&self, member: &Member) -> Subject {
        let mut subject = Subject {
            user: member.user.clone(),
            tags: member.tags.clone(),
            addresses: addresses(member.ipv4).to_vec(),
            routes: Vec::new(),
        };
        let approved = offered(member).filter(|route| {
            member.approved_routes.contains(route) || self.policy.approves(&subject, route)
        });
        subject.routes = approved.collect();
        subject
    }
}

// For the administrator.
impl State {
    /// Makes an auth key and returns it; it cannot be shown again.
    pub fn create_key(&mut self, spec: KeySpec, now: DateTime<Utc>) -> Result<String, Error> {
        if let Some(tag) = spec.tags.iter().find(|tag| !is_tag(tag)) {
            return Err(Error::BadTag { tag: tag.clone() });
        }
        let (id, secret) = (
            hex(&rand::random::<[u8; 8]>()),
            hex(&rand::random::<[u8; 32]>()),
        );
        self.store.put_key(&AuthKey {
            hash: hash(&secret),
            user: self.check_user(spec.user)?,
            reusable: spec.reusable,
            ephemeral: spec.ephemeral,
            tags: spec.tags,
            created: now,
            expires: spec.expires,
            used: false,
            id: id.clone(),
        })?;
        Ok(format!("tnkey-{id}-{secret}"))
    }

    pub fn keys(&self) -> Result<Vec<AuthKey>, Error> {
        self.store.keys()
    }

    /// Ends an auth key; nodes that joined with it stay.
    pub fn expire_key(&mut self, id: &str, now: DateTime<Utc>) -> Result<(), Error> {
        let key = self
            .store
            .key(id)?
            .ok_or_else(|| Error::NoKey { id: id.to_owned() })?;
        self.store.put_key(&AuthKey {
            expires: Some(now),
            ..key
        })
    }

    /// Lets a node route what it offers.
    pub fn approve_routes(&mut self, id: NodeId, routes: &[IpNet]) -> Result<(), Error> {
        let mut member = self.members.get(&id).cloned().ok_or(Error::NoNode { id })?;
        for route in with_both_exits(routes) {
            if !offered(&member).any(|offer| offer == route) {
                return Err(Error::RouteNotOffered {
                    id,
                    route,
                    offered: offered(&member).collect(),
                });
            }
            member.approved_routes.insert(route);
        }
        self.keep(member)
    }

    /// Takes that back. What the policy approves by itself stays approved.
    pub fn revoke_routes(&mut self, id: NodeId, routes: &[IpNet]) -> Result<(), Error> {
        let mut member = self.members.get(&id).cloned().ok_or(Error::NoNode { id })?;
        for route in with_both_exits(routes) {
            member.approved_routes.remove(&route);
        }
        self.keep(member)
    }

    pub fn nodes(&self) -> Vec<NodeSummary> {
        let subjects = self.members.values().map(|m| (m.id, self.subject(m)));
        let subjects: BTreeMap<NodeId, Subject> = subjects.collect();
        let primaries = primary_routes(self, &subjects);
        let route = |id: NodeId, route: IpNet| RouteSummary {
            route,
            approved: subjects[&id].routes.contains(&route),
            primary: primaries.get(&id).is_some_and(|all| all.contains(&route)),
        };
        let summary = |member: &Member| NodeSummary {
            id: member.id,
            name: format!("{}.{}", member.name, self.site.domain),
            addresses: addresses(member.ipv4).to_vec(),
            user: owner(member).to_owned(),
            tags: member.tags.clone(),
            online: self.is_online(member.id),
            ephemeral: member.ephemeral,
            expired: member.expired.is_some(),
            last_seen: member.last_seen,
            routes: offered(member).map(|net| route(member.id, net)).collect(),
        };
        self.members.values().map(summary).collect()
    }

    /// Takes a policy over and keeps it for the next start.
    pub fn set_policy(&mut self, text: &str) -> Result<(), Error> {
        let policy = text.parse()?;
        self.store.set_setting(POLICY, text)?;
        self.policy = policy;
        Ok(())
    }
}

/// What a node offers to route.
fn offered(member: &Member) -> impl Iterator<Item = IpNet> {
    member.hostinfo.routable_ips.iter().map(IpNet::trunc)
}

/// An exit is one for both families, or peers of Go's kind do not take it for one.
fn with_both_exits(routes: &[IpNet]) -> BTreeSet<IpNet> {
    let exits = [Ipv4Net::default().into(), Ipv6Net::default().into()];
    let is_exit = routes.iter().any(|route| route.prefix_len() == 0);
    let exits = exits.into_iter().filter(|_| is_exit);
    routes.iter().copied().chain(exits).collect()
}

/// The login name under which a node is shown.
pub(crate) fn owner(member: &Member) -> &str {
    if member.tags.is_empty() {
        &member.user
    } else {
        TAGGED_OWNER
    }
}

/// A node's addresses; the second follows from the first.
pub(crate) fn addresses(ipv4: Ipv4Addr) -> [IpAddr; 2] {
    let [a, b, c, d] = ipv4.octets().map(u16::from);
    let [p0, p1, p2] = IPV6_PREFIX;
    [
        ipv4.into(),
        Ipv6Addr::new(p0, p1, p2, 0, 0, 0, a << 8 | b, c << 8 | d).into(),
    ]
}

fn is_reserved(ip: Ipv4Addr) -> bool {
    RESERVED.iter().any(|(net, len)| {
        let shift = 32 - u32::from(*len);
        u32::from(ip) >> shift == u32::from(*net) >> shift
    })
}

/// A host name as one label of DNS (RFC 1035), which Tailscale does likewise.
fn dns_label(hostname: &str) -> String {
    let first = hostname.split('.').next().unwrap_or_default();
    let label: String = first
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .collect();
    let label = label.trim_matches('-');
    let label = label[..label.len().min(63)].trim_end_matches('-');
    if label.is_empty() {
        "node".to_owned()
    } else {
        label.to_owned()
    }
}

fn refuse(error: String) -> Registration {
    tracing::info!("registration refused: {error}");
    Registration::Done(RegisterResponse {
        error,
        ..RegisterResponse::default()
    })
}

/// The secret has 256 random bits, so a fast hash is good enough.
fn hash(secret: &str) -> String {
    hex(&Sha256::digest(secret))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tailnode_wire::tailcfg::RegisterResponseAuth;

    use super::*;

    fn tailnet() -> (tempfile::TempDir, Tailnet) {
        let dir = tempfile::tempdir().unwrap();
        let site = Site {
            url: "http://127.0.0.1:1".parse().unwrap(),
            domain: "tail.internal".to_owned(),
            derp_map: DerpMap::default(),
            names: Names::default(),
        };
        let tailnet = Tailnet::open(Store::open(dir.path()).unwrap(), site, None).unwrap();
        (dir, tailnet)
    }

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_700_000_000 + seconds, 0).unwrap()
    }

    fn request(node: NodePublicKey, hostname: &str, auth_key: &str) -> RegisterRequest {
        RegisterRequest {
            version: CAPABILITY_VERSION,
            node_key: node,
            old_node_key: None,
            auth: Some(RegisterResponseAuth {
                auth_key: auth_key.to_owned(),
            }),
            node_key_signature: None,
            expiry: None,
            followup: String::new(),
            hostinfo: Some(Hostinfo {
                hostname: hostname.to_owned(),
                ..Hostinfo::default()
            }),
            ephemeral: false,
        }
    }

    fn answer(
        state: &mut State,
        machine: &MachinePublicKey,
        request: &RegisterRequest,
    ) -> RegisterResponse {
        match state.register(machine, request, at(0)).unwrap() {
            Registration::Done(answer) => answer,
            Registration::Wait => panic!("the registration waits"),
        }
    }

    /// Joins a new node and returns its error, if any.
    fn join(state: &mut State, hostname: &str, auth_key: &str) -> String {
        let request = request(NodePublicKey::random(), hostname, auth_key);
        answer(state, &MachinePublicKey::random(), &request).error
    }

    fn key(state: &mut State, spec: KeySpec) -> String {
        state.create_key(spec, at(0)).unwrap()
    }

    fn reusable(state: &mut State) -> String {
        key(
            state,
            KeySpec {
                reusable: true,
                ..KeySpec::default()
            },
        )
    }

    fn names(state: &State) -> Vec<&str> {
        state.members.values().map(|m| m.name.as_str()).collect()
    }

    #[test]
    fn names_and_addresses_are_unique_and_stay() {
        let (_dir, tailnet) = tailnet();
        let state = &mut *tailnet.state();
        let key = reusable(state);
        state.store.set_setting(NEXT_IPV4, "100.64.0.1").unwrap();
        let machine = MachinePublicKey::random();
        let first = request(NodePublicKey::random(), "Web.example.com", &key);
        assert!(answer(state, &machine, &first).machine_authorized);
        assert_eq!(join(state, "web", &key), "");
        assert_eq!(join(state, "_", &key), "");
        assert_eq!(names(state), ["web", "web-1", "node"]);

        // The first comes back with a new node key, as after the loss of its state.
        let again = request(NodePublicKey::random(), "web", &key);
        assert!(answer(state, &machine, &again).machine_authorized);
        assert_eq!(names(state), ["web", "web-1", "node"]);
        let nodes = state.nodes();
        assert_eq!(nodes[0].addresses[0].to_string(), "100.64.0.1");
        assert_eq!(nodes[0].addresses[1].to_string(), "fd7a:115c:a1e0::6440:1");
        assert_eq!(nodes[2].addresses[0].to_string(), "100.64.0.3");

        // An address is not given again at once.
        state.remove(3).unwrap();
        assert_eq!(join(state, "db", &key), "");
        assert_eq!(state.nodes()[2].addresses[0].to_string(), "100.64.0.4");
        assert_eq!(state.nodes()[2].id, 4);
    }

    #[test]
    fn a_route_is_its_routers_when_it_is_approved_and_he_is_there() {
        let (_dir, tailnet) = tailnet();
        let state = &mut *tailnet.state();
        let key = reusable(state);
        for name in ["first", "second"] {
            let mut request = request(NodePublicKey::random(), name, &key);
            request.hostinfo.as_mut().unwrap().routable_ips = nets(&ROUTES);
            answer(state, &MachinePublicKey::random(), &request);
        }
        const ROUTES: [&str; 3] = ["10.1.0.0/24", "0.0.0.0/0", "::/0"];
        fn nets(texts: &[&str]) -> Vec<IpNet> {
            texts.iter().map(|text| text.parse().unwrap()).collect()
        }
        fn told(state: &State) -> [Vec<(bool, bool)>; 2] {
            let nodes = state.nodes().into_iter();
            let told = nodes.map(|node| {
                node.routes
                    .iter()
                    .map(|r| (r.approved, r.primary))
                    .collect()
            });
            told.collect::<Vec<_>>().try_into().unwrap()
        }
        let (no, exit, stands_by, routes) =
            ((false, false), (true, false), (true, false), (true, true));
        assert_eq!(told(state), [vec![no; 3], vec![no; 3]]);
        let stranger = state
            .approve_routes(1, &nets(&["10.2.0.0/24"]))
            .unwrap_err();
        assert!(
            stranger.to_string().contains("it offers 10.1.0.0/24, "),
            "{stranger}"
        );
        assert!(matches!(
            state.approve_routes(9, &[]),
            Err(Error::NoNode { id: 9 })
        ));
        // Half an exit is none.
        state.approve_routes(1, &nets(&["0.0.0.0/0"])).unwrap();
        state.approve_routes(2, &nets(&["10.1.0.0/24"])).unwrap();
        assert_eq!(told(state), [vec![no, exit, exit], vec![routes, no, no]]);
        state.approve_routes(1, &nets(&["10.1.0.0/24"])).unwrap();
        assert_eq!(told(state)[1], [stands_by, no, no]);
        // Who is there comes before who is not, and who is no longer a member never comes.
        let stream = state.connect(2, at(1)).unwrap();
        assert_eq!(told(state)[1], [routes, no, no]);
        state.connect(1, at(2)).unwrap();
        assert_eq!(told(state)[1], [stands_by, no, no]);
        state.expire(1, at(3)).unwrap();
        assert_eq!(told(state)[1], [routes, no, no]);
        state.disconnect(2, stream, at(4)).unwrap();
        assert_eq!(told(state)[1], [routes, no, no]);
        state.revoke_routes(2, &nets(&["10.1.0.0/24"])).unwrap();
        assert_eq!(told(state)[1], [no; 3]);
    }

    #[test]
    fn an_administrator_names_nodes() {
        let (_dir, tailnet) = tailnet();
        let state = &mut *tailnet.state();
        let key = reusable(state);
        let machine = MachinePublicKey::random();
        let web = request(NodePublicKey::random(), "web", &key);
        answer(state, &machine, &web);
        assert_eq!(join(state, "db", &key), "");
        state.call(1, "shop").unwrap();
        // It asks for the same name as before, and keeps the one that it was given.
        answer(state, &machine, &web);
        assert_eq!(names(state), ["shop", "db"]);
        for (id, name) in [(1, "db"), (1, "Web"), (1, "a.b"), (1, ""), (9, "web")] {
            assert!(state.call(id, name).is_err(), "{id} {name}");
        }
        state.call(1, "shop").unwrap();
    }

    #[test]
    fn the_state_outlives_the_server() {
        let (dir, tailnet) = tailnet();
        let key = reusable(&mut tailnet.state());
        assert_eq!(join(&mut tailnet.state(), "web", &key), "");
        let site = tailnet.state().site.clone();
        let before = tailnet.state().members.clone();
        drop(tailnet);
        let again = Tailnet::open(Store::open(dir.path()).unwrap(), site, None).unwrap();
        assert_eq!(again.state().members, before);
        assert_eq!(join(&mut again.state(), "web", &key), "");
        assert_eq!(names(&again.state()), ["web", "web-1"]);
    }

    #[test]
    fn keys_admit_whom_they_should() {
        let (_dir, tailnet) = tailnet();
        let state = &mut *tailnet.state();
        let one_off = key(state, KeySpec::default());
        assert_eq!(join(state, "a", &one_off), "");
        assert!(join(state, "b", &one_off).contains("used up"));

        let over = key(
            state,
            KeySpec {
                expires: Some(at(-1)),
                ..KeySpec::default()
            },
        );
        let error = join(state, "c", &over);
        assert!(error.contains("has expired") && error.contains("tailnode-control key create"));

        let ended = reusable(state);
        let id = ended.split('-').nth(1).unwrap();
        state.expire_key(id, at(0)).unwrap();
        assert!(join(state, "d", &ended).contains("has expired"));

        assert!(join(state, "e", "tskey-auth-abc").contains("not known"));
        let forged = format!("tnkey-{id}-{}", "0".repeat(64));
        assert!(join(state, "f", &forged).contains("not known"));
        assert_eq!(names(state), ["a"]);
        // The secret is nowhere.
        let listed = serde_json::to_string(&state.keys().unwrap()).unwrap();
        assert!(!listed.contains(one_off.rsplit('-').next().unwrap()));
    }

    #[test]
    fn a_one_off_key_is_no_obstacle_to_its_own_node() {
        let (_dir, tailnet) = tailnet();
        let state = &mut *tailnet.state();
        let one_off = key(state, KeySpec::default());
        let machine = MachinePublicKey::random();
        let request = request(NodePublicKey::random(), "a", &one_off);
        for _ in 0..2 {
            assert!(answer(state, &machine, &request).machine_authorized);
        }
        let stolen = answer(state, &MachinePublicKey::random(), &request);
        assert!(stolen.error.contains("another machine"));
    }

    #[test]
    fn tags_come_from_the_key_or_the_policy() {
        let (_dir, tailnet) = tailnet();
        let state = &mut *tailnet.state();
        let tags = BTreeSet::from(["tag:web".to_owned()]);
        let tagged = key(
            state,
            KeySpec {
                reusable: true,
                tags: tags.clone(),
                ..KeySpec::default()
            },
        );
        let plain = reusable(state);
        let mut wish = request(NodePublicKey::random(), "a", &plain);
        if let Some(info) = &mut wish.hostinfo {
            info.request_tags = vec!["tag:web".to_owned()];
        }
        assert!(
            answer(state, &MachinePublicKey::random(), &wish)
                .error
                .contains("--tag tag:web")
        );
        wish.auth = Some(RegisterResponseAuth { auth_key: tagged });
        let welcome = answer(state, &MachinePublicKey::random(), &wish);
        assert_eq!(welcome.login.login_name, TAGGED_OWNER);
        assert_eq!(state.nodes()[0].tags, tags);

        state
            .set_policy(r#"{"tagOwners": {"tag:web": ["user@tail.internal"]}}"#)
            .unwrap();
        let wish = RegisterRequest {
            node_key: NodePublicKey::random(),
            auth: Some(RegisterResponseAuth { auth_key: plain }),
            ..wish
        };
        assert_eq!(answer(state, &MachinePublicKey::random(), &wish).error, "");
        assert!(
            state
                .create_key(
                    KeySpec {
                        tags: ["web".to_owned()].into(),
                        ..KeySpec::default()
                    },
                    at(0)
                )
                .is_err()
        );
    }

    #[test]
    fn a_key_rotates_while_it_is_good_and_needs_a_right_afterwards() {
        let (_dir, tailnet) = tailnet();
        let state = &mut *tailnet.state();
        let auth = reusable(state);
        let machine = MachinePublicKey::random();
        let first = request(NodePublicKey::random(), "a", &auth);
        answer(state, &machine, &first);
        let second = RegisterRequest {
            node_key: NodePublicKey::random(),
            old_node_key: Some(first.node_key),
            auth: None,
            ..first.clone()
        };
        assert!(answer(state, &machine, &second).machine_authorized);
        assert_eq!(state.members[&1].key, second.node_key);
        assert!(!state.has_key(&first.node_key));
        // Another machine cannot take it over.
        let thief = answer(
            state,
            &MachinePublicKey::random(),
            &RegisterRequest {
                node_key: NodePublicKey::random(),
                old_node_key: Some(second.node_key),
                ..second.clone()
            },
        );
        assert!(!thief.machine_authorized && !thief.auth_url.is_empty());

        state.expire(1, at(0)).unwrap();
        assert!(answer(state, &machine, &second).node_key_expired);
        let third = RegisterRequest {
            node_key: NodePublicKey::random(),
            old_node_key: Some(second.node_key),
            ..second
        };
        assert!(!answer(state, &machine, &third).auth_url.is_empty());
        let third = RegisterRequest {
            auth: first.auth.clone(),
            ..third
        };
        assert!(answer(state, &machine, &third).machine_authorized);
        assert_eq!(names(state), ["a"]);
    }

    #[test]
    fn logout_ends_the_key_and_removes_the_ephemeral() {
        let (_dir, tailnet) = tailnet();
        let state = &mut *tailnet.state();
        let lasting = reusable(state);
        let passing = key(
            state,
            KeySpec {
                ephemeral: true,
                ..KeySpec::default()
            },
        );
        for (auth, left) in [(lasting, 1), (passing, 1)] {
            let machine = MachinePublicKey::random();
            let join = request(NodePublicKey::random(), "a", &auth);
            answer(state, &machine, &join);
            let logout = RegisterRequest {
                expiry: DateTime::from_timestamp(123, 0),
                ..join
            };
            assert!(answer(state, &machine, &logout).node_key_expired);
            assert_eq!(state.members.len(), left);
            assert!(!state.has_key(&logout.node_key));
        }
        assert!(state.nodes()[0].expired);
    }

    #[test]
    fn go_writes_a_zero_time_for_no_expiry() {
        let (_dir, tailnet) = tailnet();
        let state = &mut *tailnet.state();
        let auth = reusable(state);
        let mut join = request(NodePublicKey::random(), "a", &auth);
        join.expiry = Some("0001-01-01T00:00:00Z".parse().unwrap());
        assert!(answer(state, &MachinePublicKey::random(), &join).machine_authorized);
    }

    #[test]
    fn without_a_key_a_person_approves() {
        let (_dir, tailnet) = tailnet();
        let state = &mut *tailnet.state();
        let machine = MachinePublicKey::random();
        let ask = RegisterRequest {
            auth: None,
            ..request(NodePublicKey::random(), "a", "")
        };
        let url = answer(state, &machine, &ask).auth_url;
        assert_eq!(answer(state, &machine, &ask).auth_url, url);
        let id = url.strip_prefix("http://127.0.0.1:1/register/").unwrap();
        assert_eq!(state.pending(id), Some("a"));
        let followup = RegisterRequest {
            followup: url.clone(),
            ..ask
        };
        assert!(matches!(
            state.register(&machine, &followup, at(0)),
            Ok(Registration::Wait)
        ));

        assert!(state.approve("nonsense", None, at(0)).is_err());
        assert!(state.approve(id, Some("nobody".to_owned()), at(0)).is_err());
        state
            .approve(id, Some("alice@example.com".to_owned()), at(0))
            .unwrap();
        let welcome = answer(state, &machine, &followup);
        assert_eq!(welcome.login.login_name, "alice@example.com");
        assert_eq!(state.pending(id), None);
    }

    #[test]
    fn strangers_fill_no_memory() {
        let (_dir, tailnet) = tailnet();
        let state = &mut *tailnet.state();
        for _ in 0..MAX_PENDING + 10 {
            let ask = RegisterRequest {
                auth: None,
                ..request(NodePublicKey::random(), "a", "")
            };
            answer(state, &MachinePublicKey::random(), &ask);
        }
        assert_eq!(state.pending.len(), MAX_PENDING);
    }

    #[test]
    fn reserved_addresses_are_skipped() {
        let (_dir, tailnet) = tailnet();
        let state = &mut *tailnet.state();
        let mut after = |ip: &str| {
            state.store.set_setting(NEXT_IPV4, ip).unwrap();
            state.next_ipv4().unwrap().to_string()
        };
        assert_eq!(after("100.100.100.0"), "100.100.101.0");
        assert_eq!(after("100.115.92.0"), "100.115.94.0");
        assert_eq!(after("100.127.255.254"), "100.127.255.254");
        assert_eq!(state.next_ipv4().unwrap().to_string(), "100.64.0.1");
    }

    proptest! {
        #[test]
        fn any_host_name_becomes_a_label(hostname in ".{0,100}") {
            let label = dns_label(&hostname);
            prop_assert!((1..=63).contains(&label.len()));
            prop_assert!(!label.starts_with('-') && !label.ends_with('-'));
            prop_assert!(label.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'));
        }
    }
}
