//! The JSON that nodes and the coordination server exchange (tailcfg/tailcfg.go).
//!
//! Owned strings and both directions: the same types are read by the node and written by the
//! control server. Go writes `null` for empty slices, so every field tolerates `null` and absence
//! alike; where Go tells nil from empty, the field is an [`Option`].

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use chrono::{DateTime, Utc};
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};
use serde_json::{Value, value::RawValue};
use tracing::warn;
use ts_keys::{ChallengePublicKey, DiscoPublicKey, MachinePublicKey, NodePublicKey};

/// A node's number in its tailnet.
pub type NodeId = i64;
/// A DERP region's number; 0 is none.
pub type RegionId = u32;
/// A user's number.
pub type UserId = i64;

/// Reads `null` as the type's default.
fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(d: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(d)?.unwrap_or_default())
}

/// Reads a map and leaves out what is `null` in it.
fn present<'de, D, K, V>(d: D) -> Result<BTreeMap<K, V>, D::Error>
where
    D: Deserializer<'de>,
    K: Deserialize<'de> + Ord,
    V: Deserialize<'de>,
{
    let map = Option::<BTreeMap<K, Option<V>>>::deserialize(d)?.unwrap_or_default();
    Ok(map
        .into_iter()
        .filter_map(|(key, value)| Some((key, value?)))
        .collect())
}

/// Reads a list and leaves out what cannot be read of it. Much of a peer is in its own words, and
/// one that chose them badly must not cost all others their map.
fn readable<'de, D, T>(d: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    let read = |item: Box<RawValue>| match serde_json::from_str(item.get()) {
        Ok(item) => Some(item),
        Err(error) => {
            warn!(%error, "left out a peer that the control server describes in a way that cannot be read");
            None
        }
    };
    let list = Option::<Vec<Box<RawValue>>>::deserialize(d)?;
    Ok(list.map(|list| list.into_iter().filter_map(read).collect()))
}

/// [`readable`], where `null` is as good as empty.
fn readable_or_null<'de, D, T>(d: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    Ok(readable(d)?.unwrap_or_default())
}

fn is_default<T: Default + PartialEq>(v: &T) -> bool {
    *v == T::default()
}

/// Gives every field of a struct Go's `omitempty` on writing and tolerance of `null` on reading.
macro_rules! go_struct {
    ($(#[$meta:meta])* pub struct $name:ident { $($fields:tt)* }) => {
        #[serde_with::apply(
            _ => #[serde(default, deserialize_with = "nullable", skip_serializing_if = "is_default")],
        )]
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "PascalCase")]
        pub struct $name { $($fields)* }
    };
}

/// Answer to `GET /key?v=CAPVER`: the control server's Noise key.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OverTlsPublicKeyResponse {
    /// The key of ts2021.
    pub public_key: MachinePublicKey,
}

/// What the server may send inside the Noise channel before HTTP/2 begins.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EarlyNoise {
    /// A challenge that a node may answer to prove its node key.
    pub node_key_challenge: ChallengePublicKey,
}

/// A pre-authorisation key, as a node presents it.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RegisterResponseAuth {
    /// Secret.
    #[serde(default, deserialize_with = "nullable")]
    pub auth_key: String,
}

impl std::fmt::Debug for RegisterResponseAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RegisterResponseAuth([redacted])")
    }
}

/// Body of `POST /machine/register`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RegisterRequest {
    /// The node's capability version.
    pub version: u32,
    /// The key to register; on rotation the new one.
    pub node_key: NodePublicKey,
    /// The key being replaced on rotation. All zero: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_node_key: Option<NodePublicKey>,
    /// The auth key, if the node has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<RegisterResponseAuth>,
    /// Tailnet-lock signature of the node key, base64, if the node can make one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_key_signature: Option<String>,
    /// Asks for an expiry; a time in the past logs the node out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expiry: Option<DateTime<Utc>>,
    /// The AuthURL of an earlier answer: the server answers once it was visited.
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "String::is_empty"
    )]
    pub followup: String,
    /// What the node says of its host.
    #[serde(default)]
    pub hostinfo: Option<Hostinfo>,
    /// The node wants to be removed when it is gone.
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "is_default"
    )]
    pub ephemeral: bool,
}

go_struct! {
    /// Answer to a [`RegisterRequest`].
    pub struct RegisterResponse {
        /// Who owns the node.
        pub user: User,
        /// How they logged in.
        pub login: Login,
        /// The node key must be replaced.
        pub node_key_expired: bool,
        /// The node may use the network.
        pub machine_authorized: bool,
        /// If not empty, a person must visit it.
        #[serde(rename = "AuthURL")]
        pub auth_url: String,
        /// If not empty, the registration was refused, and this is why.
        pub error: String,
    }
}

go_struct! {
    /// A user of the tailnet.
    pub struct User {
        /// Their number.
        #[serde(rename = "ID")]
        pub id: UserId,
        /// Their name.
        pub display_name: String,
    }
}

go_struct! {
    /// A way a user logs in.
    pub struct Login {
        /// Its number.
        #[serde(rename = "ID")]
        pub id: i64,
        /// Identity provider.
        pub provider: String,
        /// An address such as `alice@example.com`.
        pub login_name: String,
        /// Their name.
        pub display_name: String,
    }
}

go_struct! {
    /// A user as peers see them.
    pub struct UserProfile {
        /// Their number.
        #[serde(rename = "ID")]
        pub id: UserId,
        /// An address such as `alice@example.com`.
        pub login_name: String,
        /// Their name.
        pub display_name: String,
        /// Where their picture is.
        #[serde(rename = "ProfilePicURL")]
        pub profile_pic_url: String,
        /// Groups they belong to.
        pub groups: Vec<String>,
    }
}

go_struct! {
    /// What a node tells of the host it runs on.
    pub struct Hostinfo {
        /// Version of the node's software.
        #[serde(rename = "IPNVersion")]
        pub ipn_version: String,
        /// Opaque id of the node's backend log.
        #[serde(rename = "BackendLogID")]
        pub backend_log_id: String,
        /// `linux`.
        #[serde(rename = "OS")]
        pub os: String,
        /// Kernel release.
        #[serde(rename = "OSVersion")]
        pub os_version: String,
        /// Whether it runs for a container.
        pub container: Option<bool>,
        /// Distribution's name.
        pub distro: String,
        /// What the node wants to be called.
        pub hostname: String,
        /// Incoming connections are refused whatever policy says.
        pub shields_up: bool,
        /// `uname -m`.
        pub machine: String,
        /// CPU architecture, Go's name for it.
        pub go_arch: String,
        /// Software that embeds the node.
        pub app: String,
        /// Subnets the node offers to route.
        #[serde(rename = "RoutableIPs")]
        pub routable_ips: Vec<IpNet>,
        /// Tags the node asks for.
        pub request_tags: Vec<String>,
        /// Services on the node; the peer API among them.
        pub services: Vec<Service>,
        /// What the node learned of its network.
        pub net_info: Option<NetInfo>,
        /// No logs are sent anywhere.
        pub no_logs_no_support: bool,
        /// Everything else, kept as it came.
        #[serde_with(skip_apply)]
        #[serde(flatten)]
        pub other: BTreeMap<String, Value>,
    }
}

go_struct! {
    /// A service that a node advertises.
    pub struct Service {
        /// `tcp`, `udp`, `peerapi4`, …
        pub proto: String,
        /// Its port.
        pub port: u16,
        /// For people.
        pub description: String,
    }
}

go_struct! {
    /// What a node learned of the network it is in.
    pub struct NetInfo {
        /// Whether its NAT maps by destination.
        #[serde(rename = "MappingVariesByDestIP")]
        pub mapping_varies_by_dest_ip: Option<bool>,
        /// Whether it reaches the Internet by IPv6.
        #[serde(rename = "WorkingIPv6")]
        pub working_ipv6: Option<bool>,
        /// Whether its kernel has IPv6.
        #[serde(rename = "OSHasIPv6")]
        pub os_has_ipv6: Option<bool>,
        /// Whether UDP reaches STUN servers.
        #[serde(rename = "WorkingUDP")]
        pub working_udp: Option<bool>,
        /// The DERP region where peers find it.
        #[serde(rename = "PreferredDERP")]
        pub preferred_derp: RegionId,
        /// Seconds to each region: `"1-v4"` → 0.02.
        #[serde(rename = "DERPLatency")]
        pub derp_latency: BTreeMap<String, f64>,
    }
}

/// Body of `POST /machine/map`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct MapRequest {
    /// The node's capability version.
    pub version: u32,
    /// `zstd` or empty.
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "String::is_empty"
    )]
    pub compress: String,
    /// The server should keep the stream alive.
    #[serde(default, deserialize_with = "nullable")]
    pub keep_alive: bool,
    /// Who asks.
    pub node_key: NodePublicKey,
    /// Its disco key.
    pub disco_key: DiscoPublicKey,
    /// Ask for a stream of responses; otherwise this is an update.
    #[serde(default, deserialize_with = "nullable")]
    pub stream: bool,
    /// What the node tells of its host.
    #[serde(default)]
    pub hostinfo: Option<Hostinfo>,
    /// Resume this map session.
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "String::is_empty"
    )]
    pub map_session_handle: String,
    /// The last sequence number seen in it.
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "is_default"
    )]
    pub map_session_seq: i64,
    /// Where peers may reach the node by UDP.
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub endpoints: Vec<SocketAddr>,
    /// The kind of each endpoint; same length.
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub endpoint_types: Vec<EndpointType>,
    /// The node needs no peers in the answer.
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "is_default"
    )]
    pub omit_peers: bool,
    /// Read-only peek; unused since version 68.
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "is_default"
    )]
    pub read_only: bool,
}

/// How an endpoint was found (tailcfg.EndpointType).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "i64", into = "i64")]
pub enum EndpointType {
    /// Not said.
    Unknown,
    /// An address of an interface.
    Local,
    /// Seen by a STUN server.
    Stun,
    /// Mapped by the router on request.
    Portmapped,
    /// STUN's address with the local port.
    Stun4LocalPort,
    /// Configured by hand.
    ExplicitConf,
}

impl From<i64> for EndpointType {
    fn from(n: i64) -> Self {
        match n {
            1 => Self::Local,
            2 => Self::Stun,
            3 => Self::Portmapped,
            4 => Self::Stun4LocalPort,
            5 => Self::ExplicitConf,
            _ => Self::Unknown,
        }
    }
}

impl From<EndpointType> for i64 {
    fn from(t: EndpointType) -> Self {
        match t {
            EndpointType::Unknown => 0,
            EndpointType::Local => 1,
            EndpointType::Stun => 2,
            EndpointType::Portmapped => 3,
            EndpointType::Stun4LocalPort => 4,
            EndpointType::ExplicitConf => 5,
        }
    }
}

go_struct! {
    /// One message of the map stream. `None` means unchanged.
    pub struct MapResponse {
        /// The session's name, on its first message.
        pub map_session_handle: String,
        /// This message's number in the session.
        pub seq: i64,
        /// An empty message that keeps the stream alive.
        pub keep_alive: bool,
        /// Prove that you are there.
        pub ping_request: Option<PingRequest>,
        /// A page the user should open.
        #[serde(rename = "PopBrowserURL")]
        pub pop_browser_url: String,
        /// The node itself.
        pub node: Option<Node>,
        /// The relays.
        #[serde(rename = "DERPMap")]
        pub derp_map: Option<DerpMap>,
        /// All peers; the next two are ignored when this is set.
        #[serde_with(skip_apply)]
        #[serde(default, deserialize_with = "readable", skip_serializing_if = "is_default")]
        pub peers: Option<Vec<Node>>,
        /// Peers added or changed.
        #[serde_with(skip_apply)]
        #[serde(default, deserialize_with = "readable_or_null", skip_serializing_if = "is_default")]
        pub peers_changed: Vec<Node>,
        /// Peers gone.
        pub peers_removed: Vec<NodeId>,
        /// Small changes; applied after the above.
        #[serde_with(skip_apply)]
        #[serde(default, deserialize_with = "readable_or_null", skip_serializing_if = "is_default")]
        pub peers_changed_patch: Vec<PeerChange>,
        /// Whether each was seen now (true) or is no longer (false).
        pub peer_seen_change: BTreeMap<NodeId, bool>,
        /// Whether each is online.
        pub online_change: BTreeMap<NodeId, bool>,
        /// DNS of the tailnet.
        #[serde(rename = "DNSConfig")]
        pub dns_config: Option<DnsConfig>,
        /// The tailnet's name for people.
        pub domain: String,
        /// The unnamed filter (`base`); empty blocks all.
        pub packet_filter: Option<Vec<FilterRule>>,
        /// Named filters; `None` deletes one, and `"*": None` deletes all that came before.
        pub packet_filters: Option<BTreeMap<String, Option<Vec<FilterRule>>>>,
        /// Users of the peers.
        pub user_profiles: Vec<UserProfile>,
        /// What is wrong with the node, in words; `Some(empty)`: nothing.
        pub health: Option<Vec<String>>,
        /// Messages for the user; `None` deletes one, and `"*": None` all.
        pub display_messages: Option<BTreeMap<String, Option<DisplayMessage>>>,
        /// Who may use Tailscale SSH.
        #[serde(rename = "SSHPolicy")]
        pub ssh_policy: Option<Value>,
        /// The server's clock.
        pub control_time: Option<DateTime<Utc>>,
        /// Tailnet lock is on (or is being turned off).
        #[serde(rename = "TKAInfo")]
        pub tka_info: Option<TkaInfo>,
        /// Instructions for debugging.
        pub debug: Option<Debug>,
        /// Addresses to reach the control server by.
        pub control_dial_plan: Option<ControlDialPlan>,
    }
}

/// A node of the tailnet, as the map shows it.
#[serde_with::apply(
    Option => #[serde(default, skip_serializing_if = "Option::is_none")],
    Vec => #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")],
    String => #[serde(default, deserialize_with = "nullable", skip_serializing_if = "String::is_empty")],
    bool => #[serde(default, deserialize_with = "nullable", skip_serializing_if = "is_default")],
    u32 => #[serde(default, deserialize_with = "nullable", skip_serializing_if = "is_default")],
    CapMap => #[serde(default, deserialize_with = "nullable", skip_serializing_if = "BTreeMap::is_empty")],
)]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Node {
    /// Its number.
    #[serde(rename = "ID")]
    pub id: NodeId,
    /// Its number that never changes.
    #[serde(rename = "StableID")]
    pub stable_id: String,
    /// Its MagicDNS name with the trailing dot.
    pub name: String,
    /// Its owner.
    #[serde(default)]
    pub user: UserId,
    /// Its WireGuard key.
    pub key: NodePublicKey,
    /// When the key expires; Go's zero time (year 1): never.
    pub key_expiry: Option<DateTime<Utc>>,
    /// Tailnet-lock signature of the key, base64.
    pub key_signature: Option<String>,
    /// Its machine key; peers need not know.
    pub machine: Option<MachinePublicKey>,
    /// Its disco key.
    pub disco_key: Option<DiscoPublicKey>,
    /// Its own addresses.
    #[serde_with(skip_apply)]
    #[serde(default, deserialize_with = "nullable")]
    pub addresses: Vec<IpNet>,
    /// What it may send from; absent: the same as `addresses`.
    #[serde(rename = "AllowedIPs")]
    pub allowed_ips: Option<Vec<IpNet>>,
    /// Where it may be reached by UDP.
    pub endpoints: Vec<SocketAddr>,
    /// `127.3.3.40:N`, N being its DERP region; older than `home_derp`.
    #[serde(rename = "DERP")]
    pub legacy_derp_string: String,
    /// The DERP region where it is found; 0: none.
    #[serde(rename = "HomeDERP")]
    pub home_derp: u32,
    /// What it told of its host.
    pub hostinfo: Option<Hostinfo>,
    /// When it joined.
    pub created: Option<DateTime<Utc>>,
    /// Its capability version.
    pub cap: u32,
    /// Its tags.
    pub tags: Vec<String>,
    /// Subnets that it is the chosen router of.
    pub primary_routes: Vec<IpNet>,
    /// When it was last connected.
    pub last_seen: Option<DateTime<Utc>>,
    /// Whether it is connected to the control server.
    pub online: Option<bool>,
    /// Whether it may use the network.
    pub machine_authorized: bool,
    /// Its capabilities and their arguments.
    pub cap_map: CapMap,
    /// Not signed under tailnet lock; only its peer API may be used.
    #[serde(rename = "UnsignedPeerAPIOnly")]
    pub unsigned_peer_api_only: bool,
    /// Its key has expired.
    pub expired: bool,
    /// The address this peer knows us by.
    pub self_node_v4_masq_addr_for_this_peer: Option<IpAddr>,
    /// The address this peer knows us by.
    pub self_node_v6_masq_addr_for_this_peer: Option<IpAddr>,
    /// It speaks WireGuard but neither disco nor DERP.
    #[serde(rename = "IsWireGuardOnly")]
    pub is_wireguard_only: bool,
    /// It may answer but not begin.
    pub is_jailed: bool,
}

/// Capabilities and their arguments; `null` counts as no arguments.
pub type CapMap = BTreeMap<String, Option<Vec<Value>>>;

impl Node {
    /// A node with nothing but its number and key.
    pub fn new(id: NodeId, key: NodePublicKey) -> Self {
        Self {
            id,
            stable_id: String::new(),
            name: String::new(),
            user: 0,
            key,
            key_expiry: None,
            key_signature: None,
            machine: None,
            disco_key: None,
            addresses: Vec::new(),
            allowed_ips: None,
            endpoints: Vec::new(),
            legacy_derp_string: String::new(),
            home_derp: 0,
            hostinfo: None,
            created: None,
            cap: 0,
            tags: Vec::new(),
            primary_routes: Vec::new(),
            last_seen: None,
            online: None,
            machine_authorized: false,
            cap_map: CapMap::new(),
            unsigned_peer_api_only: false,
            expired: false,
            self_node_v4_masq_addr_for_this_peer: None,
            self_node_v6_masq_addr_for_this_peer: None,
            is_wireguard_only: false,
            is_jailed: false,
        }
    }

    /// The DERP region where the node is found, by the new field or the old string; 0: none.
    pub fn derp_region(&self) -> RegionId {
        if self.home_derp != 0 {
            return self.home_derp;
        }
        self.legacy_derp_string
            .strip_prefix("127.3.3.40:")
            .and_then(|n| n.parse().ok())
            .unwrap_or(0)
    }

    /// What the node may send from: its allowed IPs, or its addresses where they are not given.
    pub fn allowed_ips(&self) -> &[IpNet] {
        self.allowed_ips.as_deref().unwrap_or(&self.addresses)
    }
}

/// A small change to a known peer; `None` means unchanged.
#[serde_with::skip_serializing_none]
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PeerChange {
    /// Which peer.
    #[serde(rename = "NodeID")]
    pub node_id: NodeId,
    /// New home region.
    #[serde(rename = "DERPRegion")]
    pub derp_region: Option<RegionId>,
    /// New capability version.
    pub cap: Option<u32>,
    /// New capabilities.
    pub cap_map: Option<CapMap>,
    /// New endpoints.
    pub endpoints: Option<Vec<SocketAddr>>,
    /// New node key.
    pub key: Option<NodePublicKey>,
    /// New tailnet-lock signature, base64.
    pub key_signature: Option<String>,
    /// New disco key.
    pub disco_key: Option<DiscoPublicKey>,
    /// Now online or not.
    pub online: Option<bool>,
    /// Last connected.
    pub last_seen: Option<DateTime<Utc>>,
    /// New expiry.
    pub key_expiry: Option<DateTime<Utc>>,
}

go_struct! {
    /// The relays a tailnet uses.
    pub struct DerpMap {
        /// By number. Headscale has sent `null` for regions it removes: they are left out.
        #[serde_with(skip_apply)]
        #[serde(default, deserialize_with = "present")]
        pub regions: BTreeMap<RegionId, DerpRegion>,
        /// Do not add Tailscale's own regions. People write it in either case.
        #[serde(rename = "omitDefaultRegions", alias = "OmitDefaultRegions")]
        pub omit_default_regions: bool,
    }
}

go_struct! {
    /// Relays that are close to each other and know of each other's clients.
    pub struct DerpRegion {
        /// Its number.
        #[serde(rename = "RegionID")]
        pub region_id: RegionId,
        /// A short name such as `fra`.
        pub region_code: String,
        /// A name for people.
        pub region_name: String,
        /// Do not choose it as home.
        pub avoid: bool,
        /// Neither measure it nor choose it as home.
        pub no_measure_no_home: bool,
        /// Its servers, the preferred one first.
        pub nodes: Vec<DerpNode>,
    }
}

go_struct! {
    /// One relay.
    pub struct DerpNode {
        /// Its name in the map.
        pub name: String,
        /// Its region.
        #[serde(rename = "RegionID")]
        pub region_id: RegionId,
        /// Its host name, also expected in its certificate.
        pub host_name: String,
        /// Another name to expect in the certificate, or `sha256-raw:` and its hash.
        pub cert_name: String,
        /// Its address; `none` forbids IPv4, empty asks DNS.
        #[serde(rename = "IPv4")]
        pub ipv4: String,
        /// Its address; `none` forbids IPv6, empty asks DNS.
        #[serde(rename = "IPv6")]
        pub ipv6: String,
        /// STUN's UDP port; 0 is 3478, -1 none.
        #[serde(rename = "STUNPort")]
        pub stun_port: i32,
        /// No DERP here.
        #[serde(rename = "STUNOnly")]
        pub stun_only: bool,
        /// DERP's TCP port; 0 is 443.
        #[serde(rename = "DERPPort")]
        pub derp_port: u16,
        /// Do not check the certificate; only for tests.
        pub insecure_for_tests: bool,
        /// Plain http on port 80 is possible.
        pub can_port80: bool,
    }
}

go_struct! {
    /// DNS of a tailnet.
    pub struct DnsConfig {
        /// Servers for everything else; empty: the host's own.
        pub resolvers: Vec<Resolver>,
        /// Servers for a suffix; an empty list: answered from the netmap.
        pub routes: BTreeMap<String, Option<Vec<Resolver>>>,
        /// Servers to use where the host's own cannot be known.
        pub fallback_resolvers: Vec<Resolver>,
        /// Search domains.
        pub domains: Vec<String>,
        /// MagicDNS is on.
        pub proxied: bool,
        /// Names with a certificate.
        pub cert_domains: Vec<String>,
        /// More names.
        pub extra_records: Vec<DnsRecord>,
    }
}

go_struct! {
    /// A DNS server: `1.2.3.4`, `1.2.3.4:53`, `https://…`, `tls://…`.
    pub struct Resolver {
        /// Its address.
        pub addr: String,
        /// Addresses of a server given by name.
        pub bootstrap_resolution: Vec<IpAddr>,
    }
}

go_struct! {
    /// A name of the tailnet that is not a node's.
    pub struct DnsRecord {
        /// The full name.
        pub name: String,
        /// `A`, `AAAA` or empty: by the value.
        pub r#type: String,
        /// Its address.
        pub value: String,
    }
}

go_struct! {
    /// What a packet filter lets in, or which capabilities it grants.
    pub struct FilterRule {
        /// Addresses, prefixes, ranges `a-b`, `cap:…`, or `*`.
        #[serde(rename = "SrcIPs")]
        pub src_ips: Vec<String>,
        /// Destinations that may be reached.
        pub dst_ports: Vec<NetPortRange>,
        /// IP protocol numbers; empty: TCP, UDP and ICMP.
        #[serde(rename = "IPProto")]
        pub ip_proto: Vec<i32>,
        /// Capabilities granted instead.
        pub cap_grant: Vec<CapGrant>,
    }
}

go_struct! {
    /// A destination: addresses and ports.
    pub struct NetPortRange {
        /// An address, prefix, range `a-b`, or `*`.
        #[serde(rename = "IP")]
        pub ip: String,
        /// Ports, both ends included.
        pub ports: PortRange,
    }
}

/// Ports from first to last, both included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PortRange {
    /// Lowest.
    #[serde(default)]
    pub first: u16,
    /// Highest.
    #[serde(default)]
    pub last: u16,
}

go_struct! {
    /// Capabilities that peers may use at destinations.
    pub struct CapGrant {
        /// Where.
        pub dsts: Vec<IpNet>,
        /// Which, without arguments.
        pub caps: Vec<String>,
        /// Which, with arguments.
        pub cap_map: CapMap,
    }
}

go_struct! {
    /// A question whether the node is there, or a command to probe a peer.
    pub struct PingRequest {
        /// Send an HTTP request there.
        #[serde(rename = "URL")]
        pub url: String,
        /// The URL is reached through the Noise channel.
        #[serde(rename = "URLIsNoise")]
        pub url_is_noise: bool,
        /// Log it.
        pub log: bool,
        /// Kinds of ping, by commas; `c2n` carries an HTTP request to the node.
        pub types: String,
        /// Whom to ping.
        #[serde(rename = "IP")]
        pub ip: String,
        /// The request of a `c2n` ping, base64.
        pub payload: String,
    }
}

go_struct! {
    /// A message for the node's user.
    pub struct DisplayMessage {
        /// Short.
        pub title: String,
        /// Long.
        pub text: String,
        /// `high`, `medium`, `low`.
        pub severity: String,
    }
}

go_struct! {
    /// Tailnet lock's state.
    pub struct TkaInfo {
        /// Hash of the newest update.
        pub head: String,
        /// The server believes that lock should be off.
        pub disabled: bool,
    }
}

go_struct! {
    /// Answer to `/machine/tka/bootstrap`.
    pub struct TkaBootstrapResponse {
        /// The first update, base64.
        #[serde(rename = "GenesisAUM")]
        pub genesis_aum: String,
        /// What proves that lock was ended, base64.
        pub disablement_secret: String,
    }
}

go_struct! {
    /// Answer to `/machine/tka/sync/offer`.
    pub struct TkaSyncOfferResponse {
        /// Hash of the server's newest update.
        pub head: String,
        /// Updates that the node does not have, base64, each after the one that it follows on.
        #[serde(rename = "MissingAUMs")]
        pub missing_aums: Vec<String>,
    }
}

go_struct! {
    /// Instructions of the control server for debugging.
    pub struct Debug {
        /// Sleep that long before doing anything else.
        pub sleep_seconds: f64,
        /// Send no logs.
        pub disable_log_tail: bool,
        /// Exit with this code.
        pub exit: Option<i32>,
    }
}

go_struct! {
    /// Addresses to reach the control server by.
    pub struct ControlDialPlan {
        /// The addresses.
        pub candidates: Vec<ControlIpCandidate>,
    }
}

go_struct! {
    /// One address of the control server.
    pub struct ControlIpCandidate {
        /// The address.
        #[serde(rename = "IP")]
        pub ip: String,
        /// Start after so many seconds.
        pub dial_start_delay_sec: f64,
        /// Give up after so many seconds.
        pub dial_timeout_sec: f64,
        /// Higher is preferred.
        pub priority: i32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Go writes for values that are nil there, and what Headscale has sent.
    #[test]
    fn null_is_as_good_as_absent() {
        let response: MapResponse = serde_json::from_str(
            r#"{"KeepAlive":null,"Peers":null,"PeersChanged":null,"Domain":null,"Node":{
                "ID":1,"StableID":"n1","Name":"a.example.","User":2,
                "Key":"nodekey:0101010101010101010101010101010101010101010101010101010101010101",
                "Addresses":null,"AllowedIPs":null,"Hostinfo":{"OS":"linux","Services":null},
                "CapMap":{"cap":null},"DiscoKey":null},
                "DERPMap":{"Regions":{"1":null,"2":{"RegionID":2,"RegionCode":"b\u0026w","Nodes":null}}}}"#,
        )
        .unwrap();
        assert_eq!(response.peers, None);
        let node = response.node.unwrap();
        assert!(node.addresses.is_empty() && node.cap_map.contains_key("cap"));
        let regions = response.derp_map.unwrap().regions;
        assert_eq!(regions.len(), 1);
        assert_eq!(regions[&2].region_code, "b&w");
    }

    /// What a Go peer may say of itself, and Go's types let pass.
    #[test]
    fn a_peer_that_cannot_be_read_is_left_out_alone() {
        let peer = |id: u8, rest: &str| {
            format!(
                r#"{{"ID":{id},"StableID":"","Name":"","Key":"nodekey:{}"{rest}}}"#,
                "01".repeat(32)
            )
        };
        let odd = [
            r#","HomeDERP":-1"#,
            r#","Endpoints":["[fe80::1%eth0]:1"]"#,
            r#","Hostinfo":{"RoutableIPs":[""]}"#,
        ];
        let list = odd.map(|rest| peer(1, rest)).join(",") + "," + &peer(2, "");
        let text = format!(
            r#"{{"Peers":[{list}],"PeersChanged":[{list}],
                "PeersChangedPatch":[{{"NodeID":1,"DERPRegion":-1}},{{"NodeID":2}}]}}"#
        );
        let response: MapResponse = serde_json::from_str(&text).unwrap();
        for peers in [response.peers.unwrap(), response.peers_changed] {
            assert_eq!(peers.iter().map(|peer| peer.id).collect::<Vec<_>>(), [2]);
        }
        let patched = &response.peers_changed_patch;
        assert_eq!(
            patched
                .iter()
                .map(|patch| patch.node_id)
                .collect::<Vec<_>>(),
            [2]
        );
        let response: MapResponse =
            serde_json::from_str(r#"{"Peers":[],"PeersChanged":null}"#).unwrap();
        assert_eq!(response.peers, Some(Vec::new()));
    }

    #[test]
    fn absent_empty_and_deleted_filters_differ() {
        let read = |json| serde_json::from_str::<MapResponse>(json).unwrap();
        assert_eq!(read("{}").packet_filter, None);
        assert_eq!(
            read(r#"{"PacketFilter":[]}"#).packet_filter,
            Some(Vec::new())
        );
        let named = read(r#"{"PacketFilters":{"*":null,"base":[]}}"#)
            .packet_filters
            .unwrap();
        assert_eq!(named["*"], None);
        assert_eq!(named["base"], Some(Vec::new()));
        let empty = MapResponse {
            packet_filter: Some(Vec::new()),
            ..MapResponse::default()
        };
        assert_eq!(
            serde_json::to_string(&empty).unwrap(),
            r#"{"PacketFilter":[]}"#
        );
    }

    #[test]
    fn a_nodes_region_is_read_from_either_field() {
        let mut node = Node::new(1, NodePublicKey::from_bytes([1; 32]));
        assert_eq!(node.derp_region(), 0);
        node.legacy_derp_string = "127.3.3.40:7".into();
        assert_eq!(node.derp_region(), 7);
        node.home_derp = 8;
        assert_eq!(node.derp_region(), 8);
    }

    #[test]
    fn an_auth_key_is_not_printed() {
        let auth = RegisterResponseAuth {
            auth_key: "tskey-secret".into(),
        };
        assert!(!format!("{auth:?}").contains("secret"));
        assert_eq!(
            serde_json::to_string(&auth).unwrap(),
            r#"{"AuthKey":"tskey-secret"}"#
        );
    }

    #[test]
    fn a_requests_fields_have_their_go_names() {
        let request = MapRequest {
            version: 113,
            compress: "zstd".into(),
            keep_alive: true,
            node_key: NodePublicKey::from_bytes([1; 32]),
            disco_key: DiscoPublicKey::from_bytes([2; 32]),
            stream: false,
            hostinfo: None,
            map_session_handle: String::new(),
            map_session_seq: 0,
            endpoints: vec!["192.0.2.1:41641".parse().unwrap()],
            endpoint_types: vec![EndpointType::Stun],
            omit_peers: true,
            read_only: false,
        };
        let json: Value = serde_json::to_value(&request).unwrap();
        for (field, value) in [
            ("Compress", Value::from("zstd")),
            ("Endpoints", Value::from(vec!["192.0.2.1:41641"])),
            ("EndpointTypes", Value::from(vec![2])),
            ("OmitPeers", Value::from(true)),
        ] {
            assert_eq!(json[field], value, "{field}");
        }
        assert!(
            json["NodeKey"]
                .as_str()
                .unwrap()
                .starts_with("nodekey:0101")
        );
    }
}
