//! Who may reach whom: Tailscale's policy file, as far as a packet filter needs it.
//!
//! `acls`, `grants` (their `ip` part), `groups`, `hosts`, `tagOwners` and `autoApprovers`, in
//! HuJSON. Any other section is refused by name: a rule that is silently not enforced is worse
//! than none.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use tailnode_wire::tailcfg::{FilterRule, NetPortRange, PortRange};

/// Why a policy was refused. The message says where.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Not HuJSON.
    #[error("the policy is not valid HuJSON: {0}")]
    Syntax(serde_json::Error),
    /// A section that this server does not enforce.
    #[error(
        "the policy has the section {0:?}, which this server does not support; it supports \
         acls, grants, groups, hosts, tagOwners and autoApprovers"
    )]
    Section(String),
    /// A section is not of the form that it should be.
    #[error("the policy's section {section:?} cannot be read: {error}")]
    Shape {
        /// Its name.
        section: String,
        /// What serde says.
        error: serde_json::Error,
    },
    /// A name, port or protocol that means nothing.
    #[error("the policy's section {section:?} has {value:?}: {problem}")]
    Value {
        /// Where.
        section: &'static str,
        /// What was written.
        value: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// What a policy needs to know of a node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Subject {
    /// Its owner's login name.
    pub user: String,
    /// Its tags; a tagged node is nobody's.
    pub tags: BTreeSet<String>,
    /// Its own addresses.
    pub addresses: Vec<IpAddr>,
    /// Subnets that it may route, exit routes included.
    pub routes: Vec<IpNet>,
}

/// A policy, checked and ready to be asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    rules: Vec<Rule>,
    tag_owners: BTreeMap<String, Vec<Selector>>,
    approvers: Approvers,
}

#[derive(Clone, Debug, PartialEq)]
struct Rule {
    src: Vec<Selector>,
    dst: Vec<(Selector, Vec<PortRange>)>,
    /// Empty: TCP, UDP and ICMP.
    proto: Vec<i32>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Approvers {
    routes: Vec<(IpNet, Vec<Selector>)>,
    exit_node: Vec<Selector>,
}

#[derive(Clone, Debug, PartialEq)]
enum Selector {
    Any,
    Net(IpNet),
    User(String),
    Group(BTreeSet<String>),
    Tag(String),
    /// Every node that has no tag.
    Member,
    /// Every node that has one.
    Tagged,
    /// The sender's own untagged nodes; only as a destination.
    Same,
    /// What is beyond an exit node; only as a destination.
    Internet,
}

const ALL_PORTS: PortRange = PortRange {
    first: 0,
    last: u16::MAX,
};

/// The public Internet: everything but private, link-local, loopback, CGNAT and multicast.
const INTERNET: [&str; 8] = [
    "1.0.0.0-9.255.255.255",
    "11.0.0.0-100.63.255.255",
    "100.128.0.0-126.255.255.255",
    "128.0.0.0-169.253.255.255",
    "169.255.0.0-172.15.255.255",
    "172.32.0.0-192.167.255.255",
    "192.169.0.0-223.255.255.255",
    "2000::/3",
];

impl Default for Policy {
    /// Everyone may reach everyone.
    fn default() -> Self {
        let anything = Rule {
            src: vec![Selector::Any],
            dst: vec![(Selector::Any, vec![ALL_PORTS])],
            proto: Vec::new(),
        };
        Self {
            rules: vec![anything],
            tag_owners: BTreeMap::new(),
            approvers: Approvers::default(),
        }
    }
}

impl std::str::FromStr for Policy {
    type Err = PolicyError;

    /// Reads HuJSON: JSON with comments and trailing commas.
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let file: Map<String, Value> =
            serde_json::from_str(&to_json(text)).map_err(PolicyError::Syntax)?;
        let mut sections = Sections::default();
        for (name, value) in file {
            // Go reads keys without regard to case, and people write "ACLs".
            match name.to_ascii_lowercase().as_str() {
                "acls" => sections.acls = read(name, value)?,
                "grants" => sections.grants = read(name, value)?,
                "groups" => sections.groups = read(name, value)?,
                "hosts" => sections.hosts = read(name, value)?,
                "tagowners" => sections.tag_owners = read(name, value)?,
                "autoapprovers" => sections.auto_approvers = read(name, value)?,
                _ => return Err(PolicyError::Section(name)),
            }
        }
        sections.compile()
    }
}

fn read<T: DeserializeOwned>(section: String, value: Value) -> Result<T, PolicyError> {
    serde_json::from_value(value).map_err(|error| PolicyError::Shape { section, error })
}

#[derive(Default)]
struct Sections {
    acls: Vec<Acl>,
    grants: Vec<Grant>,
    groups: BTreeMap<String, Vec<String>>,
    hosts: BTreeMap<String, String>,
    tag_owners: BTreeMap<String, Vec<String>>,
    auto_approvers: AutoApprovers,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Acl {
    action: String,
    #[serde(default)]
    proto: String,
    src: Vec<String>,
    dst: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Grant {
    src: Vec<String>,
    dst: Vec<String>,
    ip: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct AutoApprovers {
    routes: BTreeMap<IpNet, Vec<String>>,
    exit_node: Vec<String>,
}

impl Sections {
    fn compile(self) -> Result<Policy, PolicyError> {
        let mut rules = Vec::new();
        for acl in &self.acls {
            if acl.action != "accept" {
                return Err(wrong("acls", &acl.action, "the only action is \"accept\""));
            }
            let dst = acl.dst.iter().map(|text| {
                let (host, ports) = text.rsplit_once(':').ok_or_else(|| {
                    wrong(
                        "acls",
                        text,
                        "a destination is written host:ports, such as \"tag:web:80\"",
                    )
                })?;
                let host = host
                    .strip_prefix('[')
                    .and_then(|h| h.strip_suffix(']'))
                    .unwrap_or(host);
                Ok((self.destination("acls", host)?, ports_of("acls", ports)?))
            });
            rules.push(Rule {
                src: self.sources("acls", &acl.src)?,
                dst: dst.collect::<Result<_, _>>()?,
                proto: protocols("acls", &acl.proto)?,
            });
        }
        for grant in &self.grants {
            let src = self.sources("grants", &grant.src)?;
            let hosts = grant
                .dst
                .iter()
                .map(|host| self.destination("grants", host));
            let hosts: Vec<_> = hosts.collect::<Result<_, _>>()?;
            for ip in &grant.ip {
                let (proto, ports) = ip.split_once(':').unwrap_or(("", ip));
                let ports = ports_of("grants", ports)?;
                rules.push(Rule {
                    src: src.clone(),
                    dst: hosts
                        .iter()
                        .map(|host| (host.clone(), ports.clone()))
                        .collect(),
                    proto: protocols("grants", proto)?,
                });
            }
        }
        let tag_owners = self.tag_owners.iter().map(|(tag, owners)| {
            if !is_tag(tag) {
                return Err(wrong("tagOwners", tag, "a tag is written tag:name"));
            }
            Ok((tag.clone(), self.sources("tagOwners", owners)?))
        });
        let approvers = &self.auto_approvers;
        let routes = approvers
            .routes
            .iter()
            .map(|(net, who)| Ok((*net, self.sources("autoApprovers", who)?)));
        Ok(Policy {
            rules,
            tag_owners: tag_owners.collect::<Result<_, PolicyError>>()?,
            approvers: Approvers {
                routes: routes.collect::<Result<_, PolicyError>>()?,
                exit_node: self.sources("autoApprovers", &approvers.exit_node)?,
            },
        })
    }

    fn sources(
        &self,
        section: &'static str,
        texts: &[String],
    ) -> Result<Vec<Selector>, PolicyError> {
        let source = |text: &String| match self.selector(section, text)? {
            Selector::Same | Selector::Internet => {
                Err(wrong(section, text, "it can only be a destination"))
            }
            selector => Ok(selector),
        };
        texts.iter().map(source).collect()
    }

    fn destination(&self, section: &'static str, text: &str) -> Result<Selector, PolicyError> {
        self.selector(section, text)
    }

    fn selector(&self, section: &'static str, text: &str) -> Result<Selector, PolicyError> {
        if text == "*" {
            return Ok(Selector::Any);
        }
        if let Some(net) = parse_net(text) {
            return Ok(Selector::Net(net));
        }
        if is_tag(text) {
            return Ok(Selector::Tag(text.to_owned()));
        }
        if text.starts_with("group:") {
            let users = self
                .groups
                .get(text)
                .ok_or_else(|| wrong(section, text, "there is no such group in \"groups\""))?;
            if let Some(user) = users.iter().find(|user| !user.contains('@')) {
                return Err(wrong(
                    "groups",
                    user,
                    "a group's members are written name@domain",
                ));
            }
            return Ok(Selector::Group(users.iter().cloned().collect()));
        }
        if let Some(name) = text.strip_prefix("autogroup:") {
            return match name {
                "member" => Ok(Selector::Member),
                "tagged" => Ok(Selector::Tagged),
                "self" => Ok(Selector::Same),
                "internet" => Ok(Selector::Internet),
                _ => Err(wrong(
                    section,
                    text,
                    "this server knows the autogroups member, tagged, self and internet",
                )),
            };
        }
        if text.contains('@') {
            return Ok(Selector::User(text.to_owned()));
        }
        let host = self.hosts.get(text).ok_or_else(|| {
            wrong(
                section,
                text,
                "it is no address, user, tag or group, and not in \"hosts\"",
            )
        })?;
        let net = parse_net(host);
        net.map(Selector::Net)
            .ok_or_else(|| wrong("hosts", host, "it is no address or prefix"))
    }
}

fn wrong(section: &'static str, value: &str, problem: &'static str) -> PolicyError {
    PolicyError::Value {
        section,
        value: value.to_owned(),
        problem,
    }
}

pub(crate) fn is_tag(text: &str) -> bool {
    text.strip_prefix("tag:").is_some_and(|name| {
        name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    })
}

fn parse_net(text: &str) -> Option<IpNet> {
    let net = text
        .parse()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    net.ok().map(|net: IpNet| net.trunc())
}

fn ports_of(section: &'static str, text: &str) -> Result<Vec<PortRange>, PolicyError> {
    let bad = || {
        wrong(
            section,
            text,
            "ports are written 22, 80,443, 1000-2000 or *",
        )
    };
    let range = |part: &str| {
        if part == "*" {
            return Ok(ALL_PORTS);
        }
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let parse = |port: &str| port.trim().parse::<u16>().map_err(|_| bad());
        let range = PortRange {
            first: parse(first)?,
            last: parse(last)?,
        };
        if range.first > range.last {
            Err(bad())
        } else {
            Ok(range)
        }
    };
    text.split(',').map(range).collect()
}

/// Numbers of IANA's protocol registry; the names are those of Tailscale's policy files.
fn protocols(section: &'static str, text: &str) -> Result<Vec<i32>, PolicyError> {
    Ok(match text {
        // A grant's "*" means what an ACL without proto means.
        "" | "*" => Vec::new(),
        "icmp" => vec![1, 58],
        "igmp" => vec![2],
        "ipv4" | "ip-in-ip" => vec![4],
        "tcp" => vec![6],
        "egp" => vec![8],
        "igp" => vec![9],
        "udp" => vec![17],
        "gre" => vec![47],
        "esp" => vec![50],
        "ah" => vec![51],
        "sctp" => vec![132],
        number => vec![number.parse::<u8>().map(i32::from).map_err(|_| {
            wrong(
                section,
                text,
                "it is no protocol's name (tcp, udp, icmp, …) or number",
            )
        })?],
    })
}

impl Selector {
    fn matches(&self, node: &Subject) -> bool {
        match self {
            Self::Any => true,
            Self::Net(net) => {
                node.addresses.iter().any(|address| net.contains(address))
                    || node.routes.iter().any(|route| overlap(route, net))
            }
            Self::User(user) => node.tags.is_empty() && node.user == *user,
            Self::Group(users) => node.tags.is_empty() && users.contains(&node.user),
            Self::Tag(tag) => node.tags.contains(tag),
            Self::Member => node.tags.is_empty(),
            Self::Tagged => !node.tags.is_empty(),
            Self::Same => false,
            Self::Internet => node.routes.iter().any(|route| route.prefix_len() == 0),
        }
    }

    /// Whether `dst` may be meant when `src` sends.
    fn reaches(&self, src: &Subject, dst: &Subject) -> bool {
        match self {
            Self::Same => src.tags.is_empty() && dst.tags.is_empty() && src.user == dst.user,
            selector => selector.matches(dst),
        }
    }

    /// The sources of a filter rule.
    fn sources<'a>(&self, nodes: impl Iterator<Item = &'a Subject>) -> Vec<String> {
        match self {
            Self::Any => vec!["*".to_owned()],
            Self::Net(net) => vec![net.to_string()],
            selector => nodes
                .filter(|node| selector.matches(node))
                .flat_map(|node| node.addresses.iter().map(IpAddr::to_string))
                .collect(),
        }
    }

    /// The part of this destination that is at or behind `node`.
    fn destinations(&self, node: &Subject) -> Vec<String> {
        match self {
            Self::Any => vec!["*".to_owned()],
            Self::Net(net) if self.matches(node) => vec![net.to_string()],
            Self::Internet if self.matches(node) => INTERNET.map(str::to_owned).to_vec(),
            selector if selector.matches(node) => {
                node.addresses.iter().map(IpAddr::to_string).collect()
            }
            _ => Vec::new(),
        }
    }
}

fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

impl Policy {
    /// Whether `src` may send anything to `dst`.
    pub(crate) fn allows(&self, src: &Subject, dst: &Subject) -> bool {
        self.rules.iter().any(|rule| {
            rule.src.iter().any(|selector| selector.matches(src))
                && rule
                    .dst
                    .iter()
                    .any(|(selector, _)| selector.reaches(src, dst))
        })
    }

    /// What `node` has to let in, of a tailnet that consists of `all`.
    pub(crate) fn filter<'a>(
        &self,
        node: &Subject,
        all: impl Iterator<Item = &'a Subject> + Clone,
    ) -> Vec<FilterRule> {
        let mut filter = Vec::new();
        for rule in &self.rules {
            let (same, others): (Vec<_>, Vec<_>) = rule
                .dst
                .iter()
                .partition(|(selector, _)| *selector == Selector::Same);
            let mut add = |dst: Vec<(Vec<String>, &Vec<PortRange>)>, src: BTreeSet<String>| {
                let dst_ports: Vec<_> = dst
                    .into_iter()
                    .flat_map(|(ips, ports)| {
                        ips.into_iter().flat_map(move |ip| {
                            ports.iter().map(move |&ports| NetPortRange {
                                ip: ip.clone(),
                                ports,
                            })
                        })
                    })
                    .collect();
                if !dst_ports.is_empty() && !src.is_empty() {
                    filter.push(FilterRule {
                        src_ips: src.into_iter().collect(),
                        dst_ports,
                        ip_proto: rule.proto.clone(),
                        ..FilterRule::default()
                    });
                }
            };
            let dst = others
                .iter()
                .map(|(sel, ports)| (sel.destinations(node), ports))
                .collect();
            add(
                dst,
                rule.src
                    .iter()
                    .flat_map(|sel| sel.sources(all.clone()))
                    .collect(),
            );

            if !same.is_empty() && node.tags.is_empty() {
                let own: Vec<_> = node.addresses.iter().map(IpAddr::to_string).collect();
                let dst = same.iter().map(|(_, ports)| (own.clone(), ports)).collect();
                let src = all
                    .clone()
                    .filter(|src| src.tags.is_empty() && src.user == node.user)
                    .filter(|src| rule.src.iter().any(|selector| selector.matches(src)))
                    .flat_map(|src| src.addresses.iter().map(IpAddr::to_string))
                    .collect();
                add(dst, src);
            }
        }
        filter
    }

    /// Whether a node of `user` that has `tags` may also take `tag`.
    pub(crate) fn owns_tag(&self, user: &str, tags: &BTreeSet<String>, tag: &str) -> bool {
        let owner = Subject {
            user: user.to_owned(),
            tags: tags.clone(),
            addresses: Vec::new(),
            routes: Vec::new(),
        };
        let owners = self.tag_owners.get(tag);
        owners.is_some_and(|owners| owners.iter().any(|selector| selector.matches(&owner)))
    }

    /// Whether `node` may route `route`, which it offers, without an administrator's word.
    pub(crate) fn approves(&self, node: &Subject, route: &IpNet) -> bool {
        let approvers = &self.approvers;
        let matches = |who: &[Selector]| who.iter().any(|selector| selector.matches(node));
        if route.prefix_len() == 0 {
            return matches(&approvers.exit_node);
        }
        approvers
            .routes
            .iter()
            .any(|(net, who)| net.contains(route) && matches(who))
    }
}

/// HuJSON to JSON. Comments and trailing commas become spaces, so that the line and column of an
/// error stay those of the file.
pub(crate) fn to_json(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    // Where in `out` the last comma is, while only space has come after it.
    let mut comma = None;
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match (c, rest.peek()) {
            ('"', _) => {
                comma = None;
                out.push(c);
                while let Some(c) = rest.next() {
                    out.push(c);
                    match c {
                        '"' => break,
                        '\\' => out.extend(rest.next()),
                        _ => {}
                    }
                }
            }
            ('/', Some('/')) => {
                out.push(' ');
                while let Some(c) = rest.next_if(|c| *c != '\n') {
                    out.extend(std::iter::repeat_n(' ', c.len_utf8()));
                }
            }
            ('/', Some('*')) => {
                out.push(' ');
                let mut last = ' ';
                // The star that opens the comment must not also close it.
                out.extend(rest.next().map(|_| ' '));
                for c in rest.by_ref() {
                    match c {
                        '\n' => out.push(c),
                        _ => out.extend(std::iter::repeat_n(' ', c.len_utf8())),
                    }
                    if (last, c) == ('*', '/') {
                        break;
                    }
                    last = c;
                }
            }
            (',', _) => {
                comma = Some(out.len());
                out.push(c);
            }
            (']' | '}', _) => {
                if let Some(at) = comma.take() {
                    out.replace_range(at..at + 1, " ");
                }
                out.push(c);
            }
            _ => {
                if !c.is_whitespace() {
                    comma = None;
                }
                out.push(c);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(user: &str, tags: &[&str], address: &str) -> Subject {
        Subject {
            user: user.to_owned(),
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
            addresses: vec![address.parse().unwrap()],
            routes: Vec::new(),
        }
    }

    fn refusal(text: &str) -> String {
        text.parse::<Policy>().unwrap_err().to_string()
    }

    const POLICY: &str = r#"{
        // People.
        "groups": {"group:dev": ["alice@example.com"]},
        "hosts": {"db": "100.64.0.3",}, /* one host */
        "tagOwners": {"tag:web": ["group:dev"], "tag:canary": ["tag:web"]},
        "acls": [
            {"action": "accept", "src": ["group:dev"], "dst": ["tag:web:80,443", "db:5432"]},
            {"action": "accept", "proto": "udp", "src": ["tag:web"], "dst": ["db:53"]},
            {"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*"]},
        ],
        "autoApprovers": {"routes": {"10.0.0.0/8": ["tag:web"]}, "exitNode": ["group:dev"]},
    }"#;

    #[test]
    fn rules_reach_the_nodes_they_name_and_no_others() {
        let policy: Policy = POLICY.parse().unwrap();
        let alice = node("alice@example.com", &[], "100.64.0.1");
        let web = node("alice@example.com", &["tag:web"], "100.64.0.2");
        let db = node("bob@example.com", &["tag:db"], "100.64.0.3");
        let bob = node("bob@example.com", &[], "100.64.0.4");
        let phone = node("alice@example.com", &[], "100.64.0.5");
        for (src, dst, allowed) in [
            (&alice, &web, true),
            (&web, &alice, false),
            (&alice, &db, true),
            (&web, &db, true),
            (&bob, &db, false),
            (&bob, &alice, false),
            (&phone, &alice, true),
        ] {
            assert_eq!(policy.allows(src, dst), allowed, "{src:?} to {dst:?}");
        }
        let all = [&alice, &web, &db, &bob, &phone];
        let filter = |to| serde_json::to_value(policy.filter(to, all.into_iter())).unwrap();
        assert_eq!(
            filter(&db),
            serde_json::json!([
                {"SrcIPs": ["100.64.0.1", "100.64.0.5"],
                 "DstPorts": [{"IP": "100.64.0.3/32", "Ports": {"First": 5432, "Last": 5432}}]},
                {"SrcIPs": ["100.64.0.2"], "IPProto": [17],
                 "DstPorts": [{"IP": "100.64.0.3/32", "Ports": {"First": 53, "Last": 53}}]},
            ])
        );
        assert_eq!(
            filter(&phone),
            serde_json::json!([
                {"SrcIPs": ["100.64.0.1", "100.64.0.5"],
                 "DstPorts": [{"IP": "100.64.0.5", "Ports": {"First": 0, "Last": 65535}}]},
            ])
        );
    }

    #[test]
    fn grants_are_rules_by_protocol() {
        let policy: Policy = r#"{"grants": [
            {"src": ["*"], "dst": ["tag:web"], "ip": ["tcp:443", "udp:1000-2000", "22"]},
        ]}"#
        .parse()
        .unwrap();
        let web = node("a@b", &["tag:web"], "100.64.0.2");
        let filter = policy.filter(&web, std::iter::once(&web));
        let seen: Vec<_> = filter
            .iter()
            .map(|rule| (rule.ip_proto.clone(), rule.dst_ports[0].ports.first))
            .collect();
        assert_eq!(seen, [(vec![6], 443), (vec![17], 1000), (vec![], 22)]);
    }

    #[test]
    fn tags_have_owners() {
        let policy: Policy = POLICY.parse().unwrap();
        let none = BTreeSet::new();
        let web = BTreeSet::from(["tag:web".to_owned()]);
        assert!(policy.owns_tag("alice@example.com", &none, "tag:web"));
        assert!(!policy.owns_tag("bob@example.com", &none, "tag:web"));
        assert!(!policy.owns_tag("alice@example.com", &none, "tag:canary"));
        assert!(policy.owns_tag("alice@example.com", &web, "tag:canary"));
        assert!(!Policy::default().owns_tag("alice@example.com", &none, "tag:web"));
    }

    #[test]
    fn routes_need_an_approver() {
        let policy: Policy = POLICY.parse().unwrap();
        let web = node("alice@example.com", &["tag:web"], "100.64.0.2");
        let alice = node("alice@example.com", &[], "100.64.0.1");
        let (inside, exit) = ("10.1.0.0/16".parse().unwrap(), "0.0.0.0/0".parse().unwrap());
        assert!(policy.approves(&web, &inside));
        assert!(!policy.approves(&web, &exit));
        assert!(policy.approves(&alice, &exit));
        assert!(!policy.approves(&alice, &inside));
        assert!(!Policy::default().approves(&alice, &inside));
    }

    #[test]
    fn exit_nodes_let_the_internet_through_and_nothing_private() {
        let policy: Policy =
            r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["autogroup:internet:*"]}]}"#
                .parse()
                .unwrap();
        let mut exit = node("a@b", &[], "100.64.0.1");
        let plain = node("a@b", &[], "100.64.0.2");
        exit.routes = vec!["0.0.0.0/0".parse().unwrap()];
        assert!(policy.filter(&plain, std::iter::once(&exit)).is_empty());
        assert_eq!(
            policy.filter(&exit, std::iter::once(&plain))[0]
                .dst_ports
                .len(),
            INTERNET.len()
        );
        assert!(policy.allows(&plain, &exit));
        assert!(!policy.allows(&exit, &plain));
    }

    #[test]
    fn what_is_not_enforced_is_refused_by_name() {
        for (text, says) in [
            (r#"{"ssh": []}"#, "\"ssh\""),
            (r#"{"nodeAttrs": []}"#, "\"nodeAttrs\""),
            (r#"{"tests": []}"#, "\"tests\""),
            (
                r#"{"grants": [{"src": [], "dst": [], "ip": [], "app": {}}]}"#,
                "`app`",
            ),
            (
                r#"{"grants": [{"src": [], "dst": [], "ip": [], "srcPosture": []}]}"#,
                "`srcPosture`",
            ),
            (
                r#"{"acls": [{"action": "deny", "src": [], "dst": []}]}"#,
                "\"deny\"",
            ),
            (
                r#"{"acls": [{"action": "accept", "src": ["group:x"], "dst": []}]}"#,
                "\"group:x\"",
            ),
            (
                r#"{"acls": [{"action": "accept", "src": ["nohost"], "dst": []}]}"#,
                "\"nohost\"",
            ),
            (
                r#"{"acls": [{"action": "accept", "src": ["autogroup:admin"], "dst": []}]}"#,
                "autogroups",
            ),
            (
                r#"{"acls": [{"action": "accept", "src": ["autogroup:self"], "dst": []}]}"#,
                "destination",
            ),
            (
                r#"{"acls": [{"action": "accept", "src": [], "dst": ["*"]}]}"#,
                "host:ports",
            ),
            (
                r#"{"acls": [{"action": "accept", "src": [], "dst": ["*:99999"]}]}"#,
                "\"99999\"",
            ),
            (
                r#"{"acls": [{"action": "accept", "proto": "quic", "src": [], "dst": []}]}"#,
                "\"quic\"",
            ),
            ("{\n  \"acls\": [}", "line 2"),
        ] {
            assert!(refusal(text).contains(says), "{text}: {}", refusal(text));
        }
    }

    #[test]
    fn comments_and_commas_in_strings_stay() {
        let text = r#"{"a": "// no, /* no */ ,]", /* yes /*/ "b": [1, 2, /* , */ ], // ,
        }"#;
        let value: Value = serde_json::from_str(&to_json(text)).unwrap();
        assert_eq!(
            value,
            serde_json::json!({"a": "// no, /* no */ ,]", "b": [1, 2]})
        );
    }

    proptest! {
        #[test]
        fn json_is_hujson(text in ".*", numbers: Vec<i32>) {
            let json = serde_json::json!({"a": text, "b": numbers}).to_string();
            prop_assert_eq!(to_json(&json), json);
        }

        #[test]
        fn no_text_panics(text in r#"[{}\[\]/*,"\\ \na:é]*"#) {
            prop_assert_eq!(to_json(&text).lines().count(), text.lines().count());
            let _ = text.parse::<Policy>();
        }

        /// Peers are shown to each other by `allows`, packets let in by `filter`: they must agree.
        #[test]
        fn a_filter_lets_in_only_those_who_are_allowed(
            src in prop::sample::select(vec!["*", "tag:a", "tag:b", "u@x", "autogroup:member", "autogroup:tagged", "100.64.0.1"]),
            dst in prop::sample::select(vec!["*", "tag:a", "tag:b", "v@x", "autogroup:self", "autogroup:tagged", "100.64.0.2"]),
            (a, b) in (0usize..4, 0usize..4),
        ) {
            let policy: Policy =
                format!(r#"{{"acls": [{{"action": "accept", "src": ["{src}"], "dst": ["{dst}:*"]}}]}}"#)
                    .parse()
                    .unwrap();
            let kinds = [("u@x", &[][..]), ("v@x", &[]), ("u@x", &["tag:a"]), ("u@x", &["tag:b"])];
            let a = node(kinds[a].0, kinds[a].1, "100.64.0.1");
            let b = node(kinds[b].0, kinds[b].1, "100.64.0.2");
            let filter = policy.filter(&b, [&a, &b].into_iter());
            let lets_in = filter.iter().any(|rule| {
                rule.src_ips.iter().any(|ip| matches!(ip.as_str(), "*" | "100.64.0.1" | "100.64.0.1/32"))
            });
            prop_assert_eq!(lets_in, policy.allows(&a, &b));
        }
    }
}
