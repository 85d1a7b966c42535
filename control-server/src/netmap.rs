//! What one node sees of the tailnet, and how to tell it what has changed.
//!
//! A stream remembers the [`View`] that its node was last told and sends the difference to the
//! present one. So whatever happens in between, and however many changes come at once, the node
//! ends up with the truth.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use chrono::{DateTime, Utc};
use ipnet::IpNet;
use tailnode_wire::tailcfg::{
    Debug, DerpMap, DnsConfig, DnsRecord, FilterRule, Hostinfo, MapResponse, Node, NodeId,
    PeerChange, Resolver, UserId, UserProfile,
};

use crate::{
    Error,
    policy::Subject,
    store::Member,
    tailnet::{Site, State, addresses, owner},
};

/// The name of the only packet filter (tailcfg.MapResponse.PacketFilters).
const FILTER: &str = "base";

/// All nodes at one moment, as any other would see them: what the views have in common.
pub(crate) struct Census {
    subjects: BTreeMap<NodeId, Subject>,
    nodes: BTreeMap<NodeId, Arc<Node>>,
    users: BTreeMap<UserId, UserProfile>,
}

impl Census {
    pub fn take(state: &mut State) -> Result<Self, Error> {
        let owners: BTreeSet<String> = state.members.values().map(|m| owner(m).into()).collect();
        let mut ids = BTreeMap::new();
        for login in owners {
            ids.insert(login.clone(), profile(state.user_id(&login)?, login));
        }
        let subjects: BTreeMap<NodeId, Subject> = state
            .members
            .values()
            .map(|m| (m.id, state.subject(m)))
            .collect();
        let primaries = primary_routes(state, &subjects);
        let node = |member: &Member| {
            let user = ids[owner(member)].id;
            shown(
                state,
                member,
                &subjects[&member.id],
                user,
                primaries.get(&member.id),
            )
        };
        Ok(Self {
            nodes: state
                .members
                .values()
                .map(|m| (m.id, Arc::new(node(m))))
                .collect(),
            users: ids.into_values().map(|user| (user.id, user)).collect(),
            subjects,
        })
    }
}

/// All that a node is told.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct View {
    node: Option<Node>,
    peers: BTreeMap<NodeId, Arc<Node>>,
    filter: Vec<FilterRule>,
    users: BTreeMap<UserId, UserProfile>,
    derp_map: DerpMap,
    dns: DnsConfig,
    domain: String,
}

impl View {
    /// What the node of `id` is to see now. One whose key has expired sees itself only, and no
    /// one sees it.
    pub fn of(state: &mut State, id: NodeId) -> Result<Self, Error> {
        let census = state.census()?;
        let us = state.members.get(&id).ok_or(Error::NoNode { id })?;
        let (node, subject) = match (census.nodes.get(&id), census.subjects.get(&id)) {
            (Some(node), Some(subject)) => (node, subject),
            // The census was taken before the node joined, and will be taken again.
            _ => return Err(Error::NoNode { id }),
        };
        let mut view = Self {
            node: Some(Node {
                key_expiry: us.expired,
                expired: us.expired.is_some(),
                machine: Some(us.machine),
                hostinfo: Some(us.hostinfo.clone()),
                ..Node::clone(node)
            }),
            derp_map: state.site.derp_map.clone(),
            dns: dns(&state.site),
            domain: state.site.domain.clone(),
            ..Self::default()
        };
        let good = |id: &NodeId| state.members.get(id).is_some_and(|m| m.expired.is_none());
        if good(&id) {
            let subjects = census.subjects.iter().filter(|(id, _)| good(id));
            view.filter = state
                .policy
                .filter(subject, subjects.clone().map(|(_, s)| s));
            let visible = subjects.filter(|(peer, theirs)| {
                **peer != id
                    && (state.policy.allows(theirs, subject)
                        || state.policy.allows(subject, theirs))
            });
            view.peers = visible
                .filter_map(|(peer, _)| Some((*peer, Arc::clone(census.nodes.get(peer)?))))
                .collect();
        }
        let users = view.peers.values().map(|peer| peer.user).chain([node.user]);
        let users: BTreeSet<UserId> = users.collect();
        view.users = users
            .into_iter()
            .filter_map(|user| Some((user, census.users.get(&user)?.clone())))
            .collect();
        Ok(view)
    }

    /// The first message of a stream.
    pub fn full(&self, now: DateTime<Utc>) -> MapResponse {
        MapResponse {
            node: self.node.clone(),
            derp_map: Some(self.derp_map.clone()),
            peers: Some(self.peers.values().map(|peer| Node::clone(peer)).collect()),
            dns_config: Some(self.dns.clone()),
            domain: self.domain.clone(),
            packet_filters: Some(filters(&self.filter)),
            user_profiles: self.users.values().cloned().collect(),
            control_time: Some(now),
            debug: Some(Debug {
                disable_log_tail: true,
                ..Debug::default()
            }),
            ..MapResponse::default()
        }
    }

    /// What takes a node from this view to `after`; `None`: it is the same.
    pub fn delta(&self, after: &Self) -> Option<MapResponse> {
        let mut delta = MapResponse::default();
        for (id, node) in &after.peers {
            match self.peers.get(id) {
                // Cheap where only the policy has changed.
                Some(before) if Arc::ptr_eq(before, node) || before == node => {}
                Some(before) => match patch(before, node) {
                    Some(change) => delta.peers_changed_patch.push(change),
                    None => delta.peers_changed.push(Node::clone(node)),
                },
                None => delta.peers_changed.push(Node::clone(node)),
            }
        }
        let gone = self.peers.keys().filter(|id| !after.peers.contains_key(id));
        delta.peers_removed = gone.copied().collect();
        let new = |user: &&UserProfile| self.users.get(&user.id) != Some(user);
        delta.user_profiles = after.users.values().filter(new).cloned().collect();
        if self.node != after.node {
            delta.node.clone_from(&after.node);
        }
        if self.filter != after.filter {
            delta.packet_filters = Some(filters(&after.filter));
        }
        if self.derp_map != after.derp_map {
            delta.derp_map = Some(after.derp_map.clone());
        }
        if self.dns != after.dns {
            delta.dns_config = Some(after.dns.clone());
        }
        if self.domain != after.domain {
            delta.domain.clone_from(&after.domain);
        }
        (delta != MapResponse::default()).then_some(delta)
    }
}

fn filters(rules: &[FilterRule]) -> BTreeMap<String, Option<Vec<FilterRule>>> {
    BTreeMap::from([(FILTER.to_owned(), Some(rules.to_vec()))])
}

/// The small change between two states of a peer, if there is one: not every change can be told
/// so, and for each field, absent means unchanged.
fn patch(before: &Node, after: &Node) -> Option<PeerChange> {
    fn changed<T: PartialEq + Clone>(before: &T, after: &T) -> Option<T> {
        (before != after).then(|| after.clone())
    }
    let change = PeerChange {
        node_id: after.id,
        derp_region: changed(&before.home_derp, &after.home_derp),
        cap: changed(&before.cap, &after.cap),
        endpoints: changed(&before.endpoints, &after.endpoints),
        key: changed(&before.key, &after.key),
        disco_key: changed(&before.disco_key, &after.disco_key).flatten(),
        online: changed(&before.online, &after.online).flatten(),
        last_seen: changed(&before.last_seen, &after.last_seen).flatten(),
        ..PeerChange::default()
    };
    // Zero cannot be told from absent by a Go node.
    let told = change.derp_region != Some(0) && change.cap != Some(0);
    (told && patched(before, &change) == *after).then_some(change)
}

/// What a node makes of a patch.
fn patched(before: &Node, change: &PeerChange) -> Node {
    Node {
        home_derp: change.derp_region.unwrap_or(before.home_derp),
        cap: change.cap.unwrap_or(before.cap),
        endpoints: change
            .endpoints
            .clone()
            .unwrap_or_else(|| before.endpoints.clone()),
        key: change.key.unwrap_or(before.key),
        disco_key: change.disco_key.or(before.disco_key),
        online: change.online.or(before.online),
        last_seen: change.last_seen.or(before.last_seen),
        ..before.clone()
    }
}

/// A member as its peers see it.
fn shown(
    state: &State,
    member: &Member,
    subject: &Subject,
    user: UserId,
    primary: Option<&BTreeSet<IpNet>>,
) -> Node {
    let own = addresses(member.ipv4).map(IpNet::from);
    let exits = subject
        .routes
        .iter()
        .filter(|route| route.prefix_len() == 0);
    let routed = exits.chain(primary.into_iter().flatten()).copied();
    let info = &member.hostinfo;
    Node {
        stable_id: format!("n{}", member.id),
        name: format!("{}.{}.", member.name, state.site.domain),
        user,
        disco_key: member.disco,
        addresses: own.to_vec(),
        allowed_ips: Some(own.into_iter().chain(routed).collect()),
        endpoints: member.endpoints.clone(),
        home_derp: member.home_derp,
        hostinfo: Some(Hostinfo {
            os: info.os.clone(),
            hostname: info.hostname.clone(),
            shields_up: info.shields_up,
            services: info.services.clone(),
            ..Hostinfo::default()
        }),
        created: Some(member.created),
        cap: member.version,
        tags: member.tags.iter().cloned().collect(),
        primary_routes: primary.into_iter().flatten().copied().collect(),
        last_seen: Some(member.last_seen),
        online: Some(state.is_online(member.id)),
        machine_authorized: true,
        ..Node::new(member.id, member.key)
    }
}

/// Who routes each subnet: of those that may, the first that is online, or else the first.
pub(crate) fn primary_routes(
    state: &State,
    subjects: &BTreeMap<NodeId, Subject>,
) -> BTreeMap<NodeId, BTreeSet<IpNet>> {
    let mut routers: BTreeMap<IpNet, (bool, NodeId)> = BTreeMap::new();
    // Nobody sees one whose key has expired.
    let expired = |id| state.members.get(id).is_some_and(|m| m.expired.is_some());
    for (&id, subject) in subjects.iter().filter(|(id, _)| !expired(id)) {
        for route in subject
            .routes
            .iter()
            .filter(|route| route.prefix_len() != 0)
        {
            let rank = (!state.is_online(id), id);
            let best = routers.entry(*route).or_insert(rank);
            *best = rank.min(*best);
        }
    }
    let mut primaries: BTreeMap<NodeId, BTreeSet<IpNet>> = BTreeMap::new();
    for (route, (_, id)) in routers {
        primaries.entry(id).or_default().insert(route);
    }
    primaries
}

fn profile(id: UserId, login: String) -> UserProfile {
    UserProfile {
        id,
        display_name: login.clone(),
        login_name: login,
        ..UserProfile::default()
    }
}

/// MagicDNS for the tailnet's names and for the addresses of both families; and other names.
fn dns(Site { domain, names, .. }: &Site) -> DnsConfig {
    let reverse = (64..128).map(|n| format!("{n}.100.in-addr.arpa."));
    let magic = reverse.chain([
        "0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa.".to_owned(),
        domain.to_owned(),
    ]);
    let ours = magic.map(|name| (name, Some(Vec::new())));
    let resolver = |ip: &IpAddr| Resolver {
        addr: ip.to_string(),
        ..Resolver::default()
    };
    let others = names.split.iter().map(|(zone, servers)| {
        let servers = servers.iter().map(resolver).collect();
        (zone.clone(), Some(servers))
    });
    let record = |(name, ip): &(String, IpAddr)| DnsRecord {
        name: name.clone(),
        value: ip.to_string(),
        ..DnsRecord::default()
    };
    DnsConfig {
        routes: ours.chain(others).collect(),
        extra_records: names.records.iter().map(record).collect(),
        domains: vec![domain.to_owned()],
        proxied: true,
        ..DnsConfig::default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::btree_map, prelude::*};
    use tailnode_wire::keys::{DiscoPublicKey, NodePublicKey};

    use super::*;

    fn nodes() -> impl Strategy<Value = BTreeMap<NodeId, Arc<Node>>> {
        let node = (
            (0u8..2, 0u8..2, 0u32..3, 0u32..3),
            (
                any::<Option<bool>>(),
                0u16..3,
                proptest::option::of(0i64..2),
                0u8..2,
            ),
        );
        btree_map(0i64..6, node, 0..5).prop_map(|nodes| {
            let nodes = nodes.into_iter().map(|(id, (told, rest))| {
                let ((key, name, derp, cap), (online, endpoints, seen, disco)) = (told, rest);
                let node = Node {
                    name: format!("n{name}."),
                    home_derp: derp,
                    cap,
                    online,
                    endpoints: (0..endpoints).map(|n| ([10, 0, 0, 1], n).into()).collect(),
                    last_seen: seen.and_then(|s| DateTime::from_timestamp(s, 0)),
                    disco_key: (disco > 0).then(|| DiscoPublicKey::from_bytes([disco; 32])),
                    ..Node::new(id, NodePublicKey::from_bytes([key; 32]))
                };
                (id, Arc::new(node))
            });
            nodes.collect()
        })
    }

    fn views() -> impl Strategy<Value = View> {
        (nodes(), 0u16..3, any::<bool>()).prop_map(|(peers, filter, user)| View {
            node: peers.values().next().map(|node| Node::clone(node)),
            filter: (0..filter).map(|_| FilterRule::default()).collect(),
            users: user
                .then(|| (1, profile(1, "a@b".to_owned())))
                .into_iter()
                .collect(),
            peers,
            ..View::default()
        })
    }

    /// What a node makes of a message, written from tailcfg.MapResponse's documentation.
    fn apply(view: &mut View, message: MapResponse) {
        if let Some(peers) = message.peers {
            view.peers = peers
                .into_iter()
                .map(|peer| (peer.id, Arc::new(peer)))
                .collect();
        }
        for peer in message.peers_changed {
            view.peers.insert(peer.id, Arc::new(peer));
        }
        for id in message.peers_removed {
            view.peers.remove(&id);
        }
        for change in message.peers_changed_patch {
            let peer = view
                .peers
                .get_mut(&change.node_id)
                .expect("a patch is for a known peer");
            *peer = Arc::new(patched(peer, &change));
        }
        for user in message.user_profiles {
            view.users.insert(user.id, user);
        }
        if message.node.is_some() {
            view.node = message.node;
        }
        if let Some(mut filters) = message.packet_filters {
            view.filter = filters.remove(FILTER).flatten().unwrap_or_default();
        }
    }

    proptest! {
        #[test]
        fn deltas_lead_to_the_truth(views in proptest::collection::vec(views(), 1..6)) {
            let mut told = View::default();
            apply(&mut told, views[0].full(DateTime::UNIX_EPOCH));
            for (before, after) in views.iter().zip(&views[1..]) {
                match before.delta(after) {
                    Some(delta) => {
                        let json = serde_json::to_string(&delta).unwrap();
                        apply(&mut told, serde_json::from_str(&json).unwrap());
                    }
                    None => prop_assert_eq!(&before.peers, &after.peers),
                }
                // A node that is no longer told of keeps its own last state, users are never
                // taken back.
                prop_assert_eq!(&told.peers, &after.peers);
                prop_assert_eq!(&told.filter, &after.filter);
                if after.node.is_some() {
                    prop_assert_eq!(&told.node, &after.node);
                }
                prop_assert!(after.users.iter().all(|(id, user)| told.users.get(id) == Some(user)));
            }
        }

        #[test]
        fn the_same_view_is_silence(view in views()) {
            prop_assert_eq!(view.delta(&view.clone()), None);
        }
    }

    #[test]
    fn a_moved_peer_is_patched() {
        let node = Node::new(1, NodePublicKey::from_bytes([1; 32]));
        let moved = Node {
            endpoints: vec![([10, 0, 0, 1], 1).into()],
            ..node.clone()
        };
        let change = patch(&node, &moved).unwrap();
        assert_eq!(change.endpoints, Some(moved.endpoints.clone()));
        assert_eq!(
            patch(
                &node,
                &Node {
                    name: "new.".to_owned(),
                    ..moved
                }
            ),
            None
        );
    }
}
