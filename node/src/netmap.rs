//! The network map: who is in the tailnet and what they may do, kept current from the control
//! server's messages (controlclient/map.go).
//!
//! Pure state: [`Netmap::restart`] takes the first message of a map stream, [`Netmap::apply`] each
//! that follows, at a cost that grows with the message and not with the tailnet. What the messages say of
//! Tailscale SSH is ignored: no node of ours runs an SSH server.

use std::{
    collections::{BTreeMap, HashMap},
    fmt, mem,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use chrono::{DateTime, Datelike, SubsecRound, Utc};
use serde::{Deserialize, Serialize};
use tailnode_wire::{
    keys::NodePublicKey,
    lock::Authority,
    tailcfg::{
        DerpMap, DisplayMessage, DnsConfig, FilterRule, MapResponse, Node, NodeId, PeerChange,
        UserId, UserProfile,
    },
};
use tracing::warn;

/// The tailnet as the control server last described it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Netmap {
    /// The node itself.
    pub myself: Node,
    /// The peers that it may talk to.
    pub peers: HashMap<NodeId, Arc<Node>>,
    /// Peers withheld because tailnet lock wants a signature that they do not have.
    pub locked_out: HashMap<NodeId, Node>,
    /// The relays.
    pub derp_map: DerpMap,
    /// DNS of the tailnet.
    pub dns: DnsConfig,
    /// The tailnet's name for people.
    pub domain: String,
    /// Packet filters by name. No rule at all means that nothing may come in.
    pub filters: BTreeMap<String, Vec<FilterRule>>,
    /// Owners of the nodes.
    pub users: HashMap<UserId, UserProfile>,
    /// What the control server finds wrong with the node.
    pub health: Vec<String>,
    /// The control server's messages for the user, by name.
    pub display_messages: BTreeMap<String, DisplayMessage>,
    /// Tailnet lock.
    pub lock: Lock,
    /// What other nodes of this process know of the same peers.
    #[serde(skip)]
    pub known: Known,
}

/// Peers as nodes of one process know them, so that a peer that many know alike is in memory once.
/// Cheap to clone; all clones are the same.
#[derive(Clone, Default)]
pub struct Known(Arc<Mutex<HashMap<NodePublicKey, Weak<Node>>>>);

impl Known {
    /// The peer, as another node knows it or as it is.
    fn share(&self, peer: Arc<Node>) -> Arc<Node> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = known.get(&peer.key).and_then(Weak::upgrade)
            && shared == peer
        {
            return shared;
        }
        // What nobody knows any more goes before there would have to be more room.
        if known.len() == known.capacity() && !known.contains_key(&peer.key) {
            known.retain(|_, peer| peer.strong_count() > 0);
        }
        known.insert(peer.key, Arc::downgrade(&peer));
        peer
    }

    /// The same after a change.
    fn edit(&self, peer: &mut Arc<Node>, edit: impl FnOnce(&mut Node)) {
        edit(Arc::make_mut(peer));
        *peer = self.share(peer.clone());
    }
}

impl fmt::Debug for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Known").finish_non_exhaustive()
    }
}

/// What others know makes no difference.
impl PartialEq for Known {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// Whether peers need a signature.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lock {
    /// They do not.
    #[default]
    Off,
    /// They do, and whose is not known: none is believed.
    Unread {
        /// Why not.
        error: String,
    },
    /// They do, of one of these keys.
    On(Authority),
}

/// What a message changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The node itself.
    pub myself: bool,
    /// Peers added, changed or removed: those removed are no longer in the map.
    pub peers: Vec<NodeId>,
    /// The list of peers was replaced as a whole: look at every peer of the map, and at `peers` for
    /// those that are gone.
    pub all_peers: bool,
    /// The packet filters.
    pub filter: bool,
    /// DNS.
    pub dns: bool,
    /// The relays.
    pub derp: bool,
    /// Whatever [`Netmap::health_lines`] tells.
    pub health: bool,
}

impl Changes {
    /// What a map brings to those who know nothing yet.
    pub fn everything() -> Self {
        Self {
            myself: true,
            peers: Vec::new(),
            all_peers: true,
            filter: true,
            dns: true,
            derp: true,
            health: true,
        }
    }
}

/// The unnamed filter's name among the named ones.
const BASE_FILTER: &str = "base";
/// The name that stands for all in maps of named things.
const ALL: &str = "*";

impl Default for Netmap {
    /// A map of nobody: no peers, and no filter that lets anything in.
    fn default() -> Self {
        Self {
            myself: Node::new(0, NodePublicKey::from_bytes([0; 32])),
            peers: HashMap::new(),
            locked_out: HashMap::new(),
            derp_map: DerpMap::default(),
            dns: DnsConfig::default(),
            domain: String::new(),
            filters: BTreeMap::new(),
            users: HashMap::new(),
            health: Vec::new(),
            display_messages: BTreeMap::new(),
            lock: Lock::Off,
            known: Known::default(),
        }
    }
}

impl Netmap {
    /// Has its peers in memory once with all maps that do the same.
    pub fn share(&mut self, known: Known) {
        let peers = mem::take(&mut self.peers).into_iter();
        self.peers = peers.map(|(id, peer)| (id, known.share(peer))).collect();
        self.known = known;
    }

    /// Takes the first message of a stream, `now` being when it came.
    ///
    /// A stream begins with everything, so what its first message does not mention is gone.
    pub fn restart(&mut self, first: MapResponse, now: DateTime<Utc>) -> Changes {
        let fresh = Self {
            myself: self.myself.clone(),
            lock: self.lock.clone(),
            known: self.known.clone(),
            ..Self::default()
        };
        let old = mem::replace(self, fresh);
        self.apply(first, now);
        let mut changes = Changes {
            myself: old.myself != self.myself,
            peers: Vec::new(),
            all_peers: true,
            filter: old.filters != self.filters,
            dns: old.dns != self.dns,
            derp: old.derp_map != self.derp_map,
            health: old.health_lines() != self.health_lines(),
        };
        self.differences(old.peers, &mut changes.peers);
        changes
    }

    /// Takes one more message of the stream. `now` is when it came.
    pub fn apply(&mut self, message: MapResponse, now: DateTime<Utc>) -> Changes {
        // Nodes of one host hear of the same in the same second, most of the time.
        let now = now.trunc_subsecs(0);
        let mut changes = Changes::default();
        let withheld = self.locked_out.len();

        // An empty list is no list: servers cannot always leave it out (tailcfg.go).
        match message.peers {
            Some(peers) if !peers.is_empty() => {
                changes.all_peers = true;
                self.locked_out.clear();
                let old = mem::take(&mut self.peers);
                for peer in peers {
                    self.put(peer);
                }
                self.differences(old, &mut changes.peers);
            }
            _ => {
                for id in message.peers_removed {
                    if self.peers.remove(&id).is_some() {
                        changes.peers.push(id);
                    }
                    self.locked_out.remove(&id);
                }
                for peer in message.peers_changed {
                    let id = peer.id;
                    if self.put(peer) {
                        changes.peers.push(id);
                    }
                }
                for (id, seen) in message.peer_seen_change {
                    self.edit(id, &mut changes, |peer| {
                        peer.last_seen = seen.then_some(now)
                    });
                }
                for (id, online) in message.online_change {
                    self.edit(id, &mut changes, |peer| peer.online = Some(online));
                }
                for change in message.peers_changed_patch {
                    let (id, signed) = (change.node_id, change.key_signature.is_some());
                    let judge = signed || change.key.is_some();
                    self.edit(id, &mut changes, |peer| patch(peer, change));
                    if judge {
                        self.judge(id, &mut changes);
                    }
                }
            }
        }
        changes.peers.sort_unstable();
        changes.peers.dedup();
        // Servers only say when keys expire, and leave it to us to see that they have.
        for id in &changes.peers {
            if let Some(peer) = self.peers.get_mut(id)
                && peer.expired != is_expired(peer, now)
            {
                self.known.edit(peer, |peer| peer.expired = !peer.expired);
            }
        }

        if let Some(node) = message.node {
            self.myself = normal(node);
            changes.myself = true;
        }
        // Profiles of users whose last node left stay: the server does not say when they go.
        self.users.extend(
            message
                .user_profiles
                .into_iter()
                .map(|user| (user.id, user)),
        );
        if let Some(derp_map) = message.derp_map
            && !derp_map.regions.is_empty()
        {
            changes.derp = self.derp_map != derp_map;
            self.derp_map = derp_map;
        }
        if let Some(rules) = message.packet_filter {
            self.filters.insert(BASE_FILTER.into(), rules);
            changes.filter = true;
        }
        if let Some(filters) = message.packet_filters {
            changes.filter = true;
            merge(&mut self.filters, filters);
        }
        if let Some(dns) = message.dns_config {
            changes.dns = self.dns != dns;
            self.dns = dns;
        }
        if !message.domain.is_empty() {
            self.domain = message.domain;
        }
        if let Some(health) = message.health {
            changes.health |= self.health != health;
            self.health = health;
        }
        if let Some(messages) = message.display_messages {
            changes.health = true;
            merge(&mut self.display_messages, messages);
        }
        changes.health |= self.locked_out.len() != withheld;
        changes
    }

    /// Takes over what is known of tailnet lock now, and judges all peers by it.
    pub fn set_lock(&mut self, lock: Lock) -> Changes {
        self.lock = lock;
        let mut changes = Changes {
            health: true,
            ..Changes::default()
        };
        let old = mem::take(&mut self.peers);
        let withheld = mem::take(&mut self.locked_out);
        let peers = old.values().map(|peer| Node::clone(peer));
        for peer in peers.chain(withheld.into_values()) {
            self.put(peer);
        }
        self.differences(old, &mut changes.peers);
        changes
    }

    /// Marks the peers whose keys have expired by `now`; returns those that had not before. Time
    /// passes without messages: call it now and then.
    pub fn expire(&mut self, now: DateTime<Utc>) -> Vec<NodeId> {
        let mut expired = Vec::new();
        for (id, peer) in &mut self.peers {
            if !peer.expired && is_expired(peer, now) {
                self.known.edit(peer, |peer| peer.expired = true);
                expired.push(*id);
            }
        }
        expired
    }

    /// All rules of all filters; a packet that none lets in is dropped.
    pub fn filter_rules(&self) -> impl Iterator<Item = &FilterRule> {
        self.filters.values().flatten()
    }

    /// What is wrong, a line each: the control server's words, then ours.
    pub fn health_lines(&self) -> Vec<String> {
        let mut lines = self.health.clone();
        lines.extend(
            self.display_messages
                .values()
                .map(|m| match (&*m.title, &*m.text) {
                    (title, "") => title.to_owned(),
                    ("", text) => text.to_owned(),
                    (title, text) => format!("{title}: {text}"),
                }),
        );
        if !self.locked_out.is_empty() {
            /// More names than this do not fit a line.
            const NAMED: usize = 3;
            let mut names: Vec<_> = self
                .locked_out
                .values()
                .map(|p| p.name.trim_end_matches('.'))
                .collect();
            names.sort_unstable();
            let more = match names.len().saturating_sub(NAMED) {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            names.truncate(NAMED);
            let names = names.join(", ");
            lines.push(match &self.lock {
                Lock::Unread { error } => format!(
                    "tailnet lock is on, but whom it trusts is not known ({error}): peers \
                     {names}{more} are not reachable"
                ),
                _ => format!(
                    "tailnet lock is on, and peers {names}{more} are not signed, so they are not \
                     reachable: sign them with `tailscale lock sign`"
                ),
            });
        }
        if matches!(self.lock, Lock::On(_)) && !self.admits(&self.myself) {
            lines.push(format!(
                "tailnet lock is on, and this node is not signed, so its peers do not talk to it: \
                 run `tailscale lock sign {}` on a node that may sign",
                self.myself.key
            ));
        }
        lines
    }

    /// Whether tailnet lock lets this node be a member.
    fn admits(&self, node: &Node) -> bool {
        let Lock::On(authority) = &self.lock else {
            return self.lock == Lock::Off;
        };
        let signature = node.key_signature.as_deref().unwrap_or_default();
        let signature = STANDARD.decode(signature);
        signature.is_ok_and(|signature| authority.admits(&node.key, &signature).is_ok())
    }

    /// Looks again whether a peer is a member, since its key or signature changed.
    fn judge(&mut self, id: NodeId, changes: &mut Changes) {
        let peer = self.peers.remove(&id).map(Arc::unwrap_or_clone);
        if let Some(peer) = peer.or_else(|| self.locked_out.remove(&id)) {
            self.put(peer);
            changes.peers.push(id);
        }
    }

    /// Adds or replaces a peer; false if the visible peers are as before.
    fn put(&mut self, peer: Node) -> bool {
        let mut peer = normal(peer);
        // Nothing reads what peers say of their hosts, and in a large tailnet it is most of the map.
        peer.hostinfo = None;
        let id = peer.id;
        // Peers that lock does not cover pass: `normal` has taken from them all but their own
        // addresses.
        if !peer.unsigned_peer_api_only && !self.admits(&peer) {
            self.locked_out.insert(id, peer);
            return self.peers.remove(&id).is_some();
        }
        self.locked_out.remove(&id);
        let before = self.peers.get(&id);
        if before.is_some_and(|before| **before == peer) {
            return false;
        }
        if is_masqueraded(&peer) && !before.is_some_and(|before| is_masqueraded(before)) {
            warn!(
                peer = peer.name,
                "this peer knows the node by another address, which tailnode cannot translate yet: \
                 it is not reachable"
            );
        }
        self.peers.insert(id, self.known.share(Arc::new(peer)));
        true
    }

    /// Edits a known peer; one that is not known is left to the message that adds it.
    fn edit(&mut self, id: NodeId, changes: &mut Changes, edit: impl FnOnce(&mut Node)) {
        if let Some(peer) = self.peers.get_mut(&id) {
            self.known.edit(peer, edit);
            changes.peers.push(id);
        } else if let Some(peer) = self.locked_out.get_mut(&id) {
            edit(peer);
        }
    }

    /// Numbers of peers that are new, gone or different since `old`.
    fn differences(&self, mut old: HashMap<NodeId, Arc<Node>>, into: &mut Vec<NodeId>) {
        into.extend(
            self.peers
                .iter()
                .filter(|(id, peer)| old.remove(id).as_ref() != Some(peer))
                .map(|(id, _)| *id),
        );
        into.extend(old.into_keys());
        into.sort_unstable();
        into.dedup();
    }
}

/// Whether a node's key had expired by `now`.
pub fn is_expired(node: &Node, now: DateTime<Utc>) -> bool {
    node.expired || expiry(node).is_some_and(|at| at <= now)
}

/// Whether a peer of another tailnet knows us by an address that we do not have.
fn is_masqueraded(peer: &Node) -> bool {
    peer.self_node_v4_masq_addr_for_this_peer.is_some()
        || peer.self_node_v6_masq_addr_for_this_peer.is_some()
}

/// When a node's key expires; `None`: never.
pub fn expiry(node: &Node) -> Option<DateTime<Utc>> {
    // Go writes its zero time, 1 January of the year 1, for "never".
    node.key_expiry.filter(|at| at.year() > 1)
}

/// Applies a server's map of named things, where nothing under a name removes it and nothing under
/// `*` removes all that came before.
fn merge<T>(into: &mut BTreeMap<String, T>, mut from: BTreeMap<String, Option<T>>) {
    if let Some(None) = from.remove(ALL) {
        into.clear();
    }
    for (name, value) in from {
        match value {
            Some(value) => {
                into.insert(name, value);
            }
            None => {
                into.remove(&name);
            }
        }
    }
}

/// Applies a small change. Zero in a number's place means unchanged, as in Go.
fn patch(peer: &mut Node, change: PeerChange) {
    if let Some(region) = change.derp_region.filter(|r| *r != 0) {
        peer.home_derp = region;
    }
    if let Some(cap) = change.cap.filter(|c| *c != 0) {
        peer.cap = cap;
    }
    if let Some(cap_map) = change.cap_map {
        peer.cap_map = cap_map;
    }
    if let Some(endpoints) = change.endpoints {
        peer.endpoints = endpoints;
    }
    if let Some(key) = change.key {
        peer.key = key;
    }
    if let Some(signature) = change.key_signature {
        peer.key_signature = Some(signature);
    }
    if let Some(disco) = change.disco_key {
        peer.disco_key = Some(disco);
    }
    if let Some(online) = change.online {
        peer.online = Some(online);
    }
    if let Some(seen) = change.last_seen {
        peer.last_seen = Some(seen);
    }
    if let Some(at) = change.key_expiry {
        peer.key_expiry = Some(at);
        peer.expired = false;
    }
}

/// Fills the fields that replaced older ones, so that nobody else need know the older ones.
fn normal(mut node: Node) -> Node {
    node.home_derp = node.derp_region();
    node.legacy_derp_string.clear();
    // Lock does not cover such a peer, so nobody vouches for the routes that it offers.
    if node.allowed_ips.is_none() || node.unsigned_peer_api_only {
        node.allowed_ips = Some(node.addresses.clone());
    }
    // Go has no absent key: all zero stands for a peer that speaks no disco.
    node.disco_key = node
        .disco_key
        .filter(|key| key.to_crypto_box().as_bytes() != &[0; 32]);
    node
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use tailnode_wire::{
        keys::DiscoPublicKey,
        tailcfg::{DerpRegion, Hostinfo},
    };

    use super::*;

    fn key(n: u8) -> NodePublicKey {
        NodePublicKey::from_bytes([n; 32])
    }

    fn peer(id: NodeId) -> Node {
        let mut node = Node::new(id, key(id as u8));
        node.name = format!("peer-{id}.example.");
        node.addresses = vec![format!("100.64.0.{id}/32").parse().unwrap()];
        node
    }

    fn now() -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 0).unwrap()
    }

    fn first(peers: Vec<Node>) -> MapResponse {
        MapResponse {
            node: Some(peer(1)),
            peers: Some(peers),
            ..Default::default()
        }
    }

    fn started(first: MapResponse) -> Netmap {
        let mut map = Netmap::default();
        map.restart(first, now());
        map
    }

    fn netmap(peers: Vec<Node>) -> Netmap {
        started(first(peers))
    }

    fn rules(n: u8) -> Vec<FilterRule> {
        (0..n)
            .map(|n| FilterRule {
                src_ips: vec![format!("100.64.1.{n}")],
                ..Default::default()
            })
            .collect()
    }

    /// As the server writes it: absent, `null` and empty are different things on the wire.
    fn json(text: &str) -> MapResponse {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn nodes_of_one_host_have_a_peer_in_memory_once() {
        let known = Known::default();
        let mut maps = [Netmap::default(), Netmap::default()];
        let seen = |peers_changed: Vec<Node>| MapResponse {
            peers_changed,
            ..MapResponse::default()
        };
        let are_one = |maps: &[Netmap; 2]| Arc::ptr_eq(&maps[0].peers[&2], &maps[1].peers[&2]);
        for map in &mut maps {
            map.apply(seen(vec![peer(2)]), now());
        }
        assert!(!are_one(&maps));
        maps.iter_mut().for_each(|map| map.share(known.clone()));
        assert!(are_one(&maps));
        for map in &mut maps {
            let online_change = [(2, true)].into();
            let change = MapResponse {
                online_change,
                ..MapResponse::default()
            };
            assert_eq!(map.apply(change, now()).peers, [2]);
        }
        assert!(are_one(&maps) && maps[0].peers[&2].online == Some(true));
        // One is told something else.
        let mut other = peer(2);
        other.tags = vec!["tag:other".to_owned()];
        maps[0].apply(seen(vec![other]), now());
        assert!(!are_one(&maps) && maps[1].peers[&2].tags.is_empty());
        // What nobody knows any more makes room.
        drop(maps);
        let mut map = Netmap::default();
        map.share(known.clone());
        for id in 2..250 {
            map.apply(seen(vec![peer(id)]), now());
            map.apply(
                MapResponse {
                    peers_removed: vec![id],
                    ..MapResponse::default()
                },
                now(),
            );
        }
        assert!(known.0.lock().unwrap().len() < 20);
    }

    #[test]
    fn a_new_stream_forgets_what_it_does_not_mention() {
        let mut map = netmap(vec![peer(2), peer(3)]);
        map.apply(
            json(r#"{"PacketFilters":{"a":[{"SrcIPs":["*"]}]},"Health":["x"]}"#),
            now(),
        );
        let mut moved = peer(3);
        moved.home_derp = 4;
        let changes = map.restart(first(vec![moved, peer(4)]), now());
        assert_eq!(
            changes,
            Changes {
                peers: vec![2, 3, 4],
                all_peers: true,
                filter: true,
                health: true,
                ..Changes::default()
            }
        );
        assert_eq!(map.filter_rules().count(), 0);
        let again = map.restart(first(vec![]), now());
        assert_eq!(again.peers, [3, 4]);
        assert!(map.peers.is_empty());
    }

    #[test]
    fn nothing_said_is_nothing_changed() {
        let mut map = netmap(vec![peer(2)]);
        let before = map.clone();
        assert_eq!(
            map.apply(json(r#"{"Peers":[],"PeersChanged":null}"#), now()),
            Changes::default()
        );
        assert_eq!(map, before);
    }

    #[test]
    fn a_full_list_takes_the_place_of_the_old_and_of_deltas_beside_it() {
        let mut map = netmap(vec![peer(2), peer(3)]);
        let mut message = MapResponse {
            peers: Some(vec![peer(3), peer(4)]),
            ..Default::default()
        };
        message.peers_removed = vec![3];
        let changes = map.apply(message, now());
        assert!(changes.all_peers);
        assert_eq!(changes.peers, [2, 4]);
        assert!(map.peers.contains_key(&3));
    }

    #[test]
    fn patches_come_last_and_only_to_known_peers() {
        let mut map = netmap(vec![]);
        let changes = map.apply(
            json(
                r#"{"PeersChangedPatch":[
                    {"NodeID":2,"DERPRegion":7,"Cap":120,"Endpoints":["192.0.2.1:41641"],"Online":true},
                    {"NodeID":2,"DERPRegion":0},{"NodeID":9,"DERPRegion":7}],
                    "PeersChanged":[{"ID":2,"StableID":"","Name":"b.","Key":"nodekey:0202020202020202020202020202020202020202020202020202020202020202",
                    "DERP":"127.3.3.40:3","Addresses":["100.64.0.2/32"]}],
                    "PeerSeenChange":{"2":true}}"#,
            ),
            now(),
        );
        assert_eq!(changes.peers, [2]);
        let peer = &map.peers[&2];
        assert_eq!(
            (peer.home_derp, peer.cap, peer.online),
            (7, 120, Some(true))
        );
        assert_eq!(peer.last_seen, Some(now()));
        assert_eq!(peer.endpoints, ["192.0.2.1:41641".parse().unwrap()]);
        assert_eq!(map.peers.len(), 1);
    }

    #[test]
    fn filters_are_absent_empty_or_gone() {
        let mut map = netmap(vec![]);
        assert_eq!(map.filter_rules().count(), 0);
        map.apply(json(r#"{"PacketFilter":[{"SrcIPs":["*"]}]}"#), now());
        assert_eq!(map.filters.keys().collect::<Vec<_>>(), ["base"]);
        let changes = map.apply(
            json(r#"{"PacketFilters":{"a":[{"SrcIPs":["*"]}],"b":[]}}"#),
            now(),
        );
        assert!(changes.filter);
        assert_eq!(map.filters.keys().collect::<Vec<_>>(), ["a", "b", "base"]);
        assert_eq!(map.filter_rules().count(), 2);
        map.apply(json(r#"{"PacketFilters":{"b":null}}"#), now());
        assert_eq!(map.filters.len(), 2);
        assert!(!map.apply(json(r#"{"PacketFilter":null}"#), now()).filter);
        map.apply(
            json(r#"{"PacketFilters":{"*":null,"c":[{"SrcIPs":["*"]}]}}"#),
            now(),
        );
        assert_eq!(map.filters.keys().collect::<Vec<_>>(), ["c"]);
        assert!(map.apply(json(r#"{"PacketFilter":[]}"#), now()).filter);
        assert_eq!(map.filters["base"], []);
    }

    #[test]
    fn relays_without_regions_change_nothing() {
        let mut map = netmap(vec![]);
        assert!(
            map.apply(
                json(r#"{"DERPMap":{"Regions":{"1":{"RegionID":1}}}}"#),
                now()
            )
            .derp
        );
        assert!(
            !map.apply(json(r#"{"DERPMap":{"Regions":null}}"#), now())
                .derp
        );
        assert_eq!(map.derp_map.regions.len(), 1);
    }

    #[test]
    fn health_is_replaced_and_messages_are_merged() {
        let mut map = netmap(vec![]);
        assert!(
            map.apply(json(r#"{"Health":["clock is wrong"]}"#), now())
                .health
        );
        assert!(
            !map.apply(json(r#"{"Health":["clock is wrong"]}"#), now())
                .health
        );
        map.apply(
            json(
                r#"{"DisplayMessages":{"a":{"Title":"Note","Text":"new terms"},"b":{"Text":"x"}}}"#,
            ),
            now(),
        );
        map.apply(json(r#"{"DisplayMessages":{"b":null}}"#), now());
        assert_eq!(map.health_lines(), ["clock is wrong", "Note: new terms"]);
        map.apply(json(r#"{"Health":[],"DisplayMessages":{"*":null}}"#), now());
        assert_eq!(map.health_lines(), [""; 0]);
    }

    #[test]
    fn tailnet_lock_withholds_peers_until_it_is_off() {
        let mut api_only = peer(3);
        api_only.unsigned_peer_api_only = true;
        api_only.allowed_ips = Some(vec!["0.0.0.0/0".parse().unwrap()]);
        let mut map = netmap(vec![peer(2), api_only]);
        assert_eq!(map.peers[&3].allowed_ips(), map.peers[&3].addresses);

        let error = "no answer".to_owned();
        let changes = map.set_lock(Lock::Unread { error });
        assert_eq!(changes.peers, [2]);
        assert!(changes.health);
        assert_eq!(map.peers.keys().collect::<Vec<_>>(), [&3]);
        assert!(map.health_lines()[0].contains("(no answer): peers peer-2.example are not"));

        let changes = map.apply(
            MapResponse {
                peers_changed: vec![peer(4)],
                ..Default::default()
            },
            now(),
        );
        assert_eq!(changes.peers, [] as [NodeId; 0]);
        assert!(changes.health);
        map.apply(
            json(r#"{"PeersChangedPatch":[{"NodeID":4,"DERPRegion":5}]}"#),
            now(),
        );

        // It outlives the stream.
        let mut again = map.clone();
        again.restart(first(vec![peer(2)]), now());
        assert!(again.peers.is_empty());

        let changes = map.set_lock(Lock::Off);
        assert_eq!(changes.peers, [2, 4]);
        assert_eq!(map.peers[&4].home_derp, 5);
        assert!(map.locked_out.is_empty() && map.health_lines().is_empty());
    }

    #[test]
    fn fields_of_old_servers_are_understood() {
        let mut old = peer(2);
        old.legacy_derp_string = "127.3.3.40:12".into();
        old.disco_key = Some(DiscoPublicKey::from_bytes([0; 32]));
        old.hostinfo = Some(Hostinfo::default());
        let map = netmap(vec![old]);
        let peer = &map.peers[&2];
        assert_eq!(peer.home_derp, 12);
        assert_eq!(peer.allowed_ips.as_ref(), Some(&peer.addresses));
        assert_eq!((&peer.disco_key, &peer.hostinfo), (&None, &None));
    }

    #[test]
    fn keys_expire_unless_never() {
        let mut node = peer(2);
        assert!(!is_expired(&node, now()));
        node.key_expiry = Some("0001-01-01T00:00:00Z".parse().unwrap());
        assert!(!is_expired(&node, now()));
        node.key_expiry = Some(now());
        assert!(is_expired(&node, now()));
    }

    #[test]
    fn tailnet_lock_lets_in_whom_its_keys_have_signed() {
        // Of the tests of `tailnode_wire::lock`: trust, and its word for the node key 07….
        const GENESIS: &str = "pAEFAvYFowH2AoFYIMP+qKDXDt4lVZkMpg1wqKA8vmJ9LJ88sOK6cJPQiE4vA4GkAQECAgNYIIqI4910CfGV\
            /VLbLTy6XXLKZwm/HZQSG/N0iAG0D29cDKFkbmFtZWNvbmUXgaIBWCCKiOPddAnxlf1S2y08ul1yymcJvx2U\
            EhvzdIgBtA9vXAJYQGJvtNFQM2ueCYsP3BKTpAbf/5lIUiNCJP1VsluhxetaPNQxZF/fNE2zAPDMS5VZtadk\
            xOcx22rVFycFJMteNAE=";
        const SIGNATURE: &str = "pQEBAlgibnAHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwNYIIqI4910CfGV/VLbLTy6XXLKZwm/\
            HZQSG/N0iAG0D29cBFhAU4VvTUnMVZPNy0Ws5K8w/Rgj7mlfuLPFoFn7mKQC9UPogDSXIq0xdyABledsIz/7\
            o5Et30ncy9JIS305YKJvDQZYIO1JKMYo0cLG6ukDOJBZlWEpWSc6XGP5NjbBRhSshzfR";
        let authority = Authority::begin(&STANDARD.decode(GENESIS).unwrap()).unwrap();
        let signed = |id| {
            let mut peer = peer(id);
            peer.key_signature = Some(SIGNATURE.into());
            peer
        };
        let mut map = netmap(vec![signed(7), signed(8), peer(9)]);
        map.set_lock(Lock::On(authority));
        assert_eq!(map.peers.keys().collect::<Vec<_>>(), [&7]);
        let lines = map.health_lines();
        assert!(lines[0].contains("peers peer-8.example, peer-9.example are not signed"));
        assert!(lines[1].contains("this node is not signed") && lines[1].contains("nodekey:"));
        // The peer 9 takes the key that is signed, and the peer 7 loses it.
        let key = |id, n: u8| PeerChange {
            node_id: id,
            key: Some(super::tests::key(n)),
            key_signature: Some(SIGNATURE.into()),
            ..PeerChange::default()
        };
        let changes = map.apply(
            MapResponse {
                peers_changed_patch: vec![key(9, 7), key(7, 1)],
                ..MapResponse::default()
            },
            now(),
        );
        assert_eq!(changes.peers, [7, 9]);
        assert_eq!(map.peers.keys().collect::<Vec<_>>(), [&9]);
        let kept = serde_json::to_string(&map).unwrap();
        assert_eq!(serde_json::from_str::<Netmap>(&kept).unwrap(), map);
    }

    #[test]
    fn peers_expire_by_word_of_the_server_and_by_the_clock() {
        let later = now() + chrono::TimeDelta::hours(1);
        let expires_at = |at: DateTime<Utc>| {
            let change = PeerChange {
                node_id: 2,
                key_expiry: Some(at),
                ..Default::default()
            };
            MapResponse {
                peers_changed_patch: vec![change],
                ..Default::default()
            }
        };
        let mut map = netmap(vec![peer(2), peer(3)]);
        assert_eq!(map.apply(expires_at(now()), now()).peers, [2]);
        assert!(map.peers[&2].expired && !map.peers[&3].expired);
        map.apply(expires_at(later), now());
        assert!(!map.peers[&2].expired);
        assert!(map.expire(now()).is_empty());
        assert_eq!(map.expire(later), [2]);
        assert!(map.expire(later).is_empty());
        assert!(map.peers[&2].expired);
    }

    /// One thing that happens in a tailnet.
    #[derive(Clone, Debug)]
    enum Happening {
        Changed(Box<Node>),
        Removed(NodeId),
        Moved(NodeId, u32),
        Rekeyed(NodeId, u8),
        Online(NodeId, bool),
        Base(u8),
        Named(u8, Option<u8>),
        OnlyNamed(u8, u8),
        Dns(u8),
        Health(u8),
        Message(u8, Option<u8>),
        Relays(u8),
        User(u8, u8),
        Myself(u8),
    }

    fn happening() -> impl Strategy<Value = Happening> {
        use Happening::*;
        let id = 2..8i64;
        let one = || any::<u8>();
        prop_oneof![
            4 => (id.clone(), 0..4u8, any::<bool>()).prop_map(|(id, n, api_only)| {
                let mut peer = peer(id);
                peer.tags = vec![format!("tag:{n}")];
                peer.unsigned_peer_api_only = api_only;
                Changed(Box::new(peer))
            }),
            2 => id.clone().prop_map(Removed),
            2 => (id.clone(), 1..4u32).prop_map(|(id, r)| Moved(id, r)),
            1 => (id.clone(), one()).prop_map(|(id, k)| Rekeyed(id, k)),
            1 => (id, any::<bool>()).prop_map(|(id, on)| Online(id, on)),
            1 => (0..3u8).prop_map(Base),
            2 => (0..3u8, proptest::option::of(0..3u8)).prop_map(|(n, r)| Named(n, r)),
            1 => (0..3u8, 0..3u8).prop_map(|(n, r)| OnlyNamed(n, r)),
            1 => one().prop_map(Dns),
            1 => (0..3u8).prop_map(Health),
            1 => (0..3u8, proptest::option::of(one())).prop_map(|(n, t)| Message(n, t)),
            1 => (1..4u8).prop_map(Relays),
            1 => (0..3u8, one()).prop_map(|(id, n)| User(id, n)),
            1 => one().prop_map(Myself),
        ]
    }

    /// What the server knows: the whole map, kept without any of the code under test.
    struct Server {
        full: MapResponse,
        peers: BTreeMap<NodeId, Node>,
        filters: BTreeMap<String, Vec<FilterRule>>,
        messages: BTreeMap<String, DisplayMessage>,
        users: BTreeMap<UserId, UserProfile>,
    }

    impl Server {
        fn new() -> Self {
            Self {
                full: first(vec![]),
                peers: BTreeMap::new(),
                filters: BTreeMap::new(),
                messages: BTreeMap::new(),
                users: BTreeMap::new(),
            }
        }

        /// Notes what happened and says it as a delta.
        fn delta(&mut self, what: Happening) -> MapResponse {
            let mut delta = MapResponse::default();
            let patch = |id| PeerChange {
                node_id: id,
                ..Default::default()
            };
            match what {
                Happening::Changed(peer) => {
                    self.peers.insert(peer.id, Node::clone(&peer));
                    delta.peers_changed.push(*peer);
                }
                Happening::Removed(id) => {
                    self.peers.remove(&id);
                    delta.peers_removed.push(id);
                }
                Happening::Moved(id, region) => {
                    if let Some(peer) = self.peers.get_mut(&id) {
                        peer.home_derp = region;
                    }
                    delta.peers_changed_patch.push(PeerChange {
                        derp_region: Some(region),
                        ..patch(id)
                    });
                }
                Happening::Rekeyed(id, n) => {
                    if let Some(peer) = self.peers.get_mut(&id) {
                        peer.key = key(n);
                    }
                    delta.peers_changed_patch.push(PeerChange {
                        key: Some(key(n)),
                        ..patch(id)
                    });
                }
                Happening::Online(id, online) => {
                    if let Some(peer) = self.peers.get_mut(&id) {
                        peer.online = Some(online);
                    }
                    delta.online_change.insert(id, online);
                }
                Happening::Base(n) => {
                    self.filters.insert("base".into(), rules(n));
                    delta.packet_filter = Some(rules(n));
                }
                Happening::Named(name, n) => {
                    let name = format!("f{name}");
                    match n {
                        Some(n) => self.filters.insert(name.clone(), rules(n)),
                        None => self.filters.remove(&name),
                    };
                    delta.packet_filters = Some([(name, n.map(rules))].into());
                }
                Happening::OnlyNamed(name, n) => {
                    let name = format!("f{name}");
                    self.filters = [(name.clone(), rules(n))].into();
                    delta.packet_filters =
                        Some([("*".into(), None), (name, Some(rules(n)))].into());
                }
                Happening::Dns(n) => {
                    let dns = DnsConfig {
                        domains: vec![n.to_string()],
                        ..Default::default()
                    };
                    delta.dns_config = Some(dns);
                    self.full.dns_config = delta.dns_config.clone();
                }
                Happening::Health(n) => {
                    delta.health = Some((0..n).map(|n| n.to_string()).collect());
                    self.full.health = delta.health.clone();
                }
                Happening::Message(name, text) => {
                    let name = format!("m{name}");
                    let message = text.map(|t| DisplayMessage {
                        text: t.to_string(),
                        ..Default::default()
                    });
                    match message.clone() {
                        Some(message) => self.messages.insert(name.clone(), message),
                        None => self.messages.remove(&name),
                    };
                    delta.display_messages = Some([(name, message)].into());
                }
                Happening::Relays(n) => {
                    let regions = (0..n.into()).map(|n| (n, DerpRegion::default())).collect();
                    delta.derp_map = Some(DerpMap {
                        regions,
                        ..Default::default()
                    });
                    self.full.derp_map = delta.derp_map.clone();
                }
                Happening::User(id, n) => {
                    let user = UserProfile {
                        id: id.into(),
                        login_name: n.to_string(),
                        ..Default::default()
                    };
                    self.users.insert(user.id, user.clone());
                    delta.user_profiles.push(user);
                }
                Happening::Myself(n) => {
                    let mut node = peer(1);
                    node.tags = vec![n.to_string()];
                    delta.node = Some(node);
                    self.full.node = delta.node.clone();
                }
            }
            delta
        }

        fn full(&self) -> MapResponse {
            MapResponse {
                peers: Some(self.peers.values().cloned().collect()),
                packet_filters: Some(
                    self.filters
                        .iter()
                        .map(|(k, v)| (k.clone(), Some(v.clone())))
                        .collect(),
                ),
                display_messages: Some(
                    self.messages
                        .iter()
                        .map(|(k, v)| (k.clone(), Some(v.clone())))
                        .collect(),
                ),
                user_profiles: self.users.values().cloned().collect(),
                ..self.full.clone()
            }
        }
    }

    proptest! {
        #[test]
        fn deltas_add_up_to_the_full_map(happenings in proptest::collection::vec(happening(), 0..40)) {
            let mut server = Server::new();
            let mut map = started(server.full());
            for what in happenings {
                let before = map.clone();
                let changes = map.apply(server.delta(what), now());
                for id in before.peers.keys().chain(map.peers.keys()) {
                    if before.peers.get(id) != map.peers.get(id) {
                        prop_assert!(changes.peers.contains(id));
                    }
                }
                prop_assert!(changes.filter || before.filters == map.filters);
                prop_assert!(changes.dns || before.dns == map.dns);
                prop_assert!(changes.derp || before.derp_map == map.derp_map);
                prop_assert!(changes.myself || before.myself == map.myself);
                prop_assert!(changes.health || before.health_lines() == map.health_lines());
                let fresh = started(server.full());
                prop_assert_eq!(&map, &fresh);
                let ids: BTreeSet<_> = before.peers.keys().chain(map.peers.keys()).collect();
                let differ: Vec<_> = ids
                    .into_iter()
                    .filter(|id| before.peers.get(id) != map.peers.get(id))
                    .copied()
                    .collect();
                let mut restarted = before;
                prop_assert_eq!(restarted.restart(server.full(), now()).peers, differ);
                prop_assert_eq!(&restarted, &map);
            }
            let text = serde_json::to_vec(&map).unwrap();
            prop_assert_eq!(serde_json::from_slice::<Netmap>(&text).unwrap(), map);
        }
    }
}
