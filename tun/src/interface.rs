use std::{collections::HashSet, fs, io, net::IpAddr, path::Path};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, IpProtocol, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
    link::{LinkAttribute, LinkFlags, LinkMessage},
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        RouteType,
    },
    rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
};
use nix::net::if_::if_nametoindex;
use serde::{Deserialize, Serialize};

use crate::{Error, Netns, masquerade, netlink::Netlink};

/// How a device shall be set up inside its container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The node's own addresses.
    pub addresses: Vec<IpNet>,
    /// What is reached through the device. Routes of a family in which the node has no address are
    /// left out.
    pub routes: Vec<IpNet>,
    /// The largest packet, in bytes.
    pub mtu: u32,
    /// The device's number among the container's tailnet devices: 0 for tailscale0, which wins
    /// where two tailnets have the same route.
    pub index: u32,
    /// Whether DNS queries that would leave by the default route are sent to the device instead.
    /// Docker's embedded resolver asks its servers from inside the container's namespace, and
    /// this is the way to see those queries.
    pub trap_dns: bool,
    /// What else leaves by the device.
    pub exit: Exit,
    /// Whether the container forwards what comes in by the device, under its own addresses.
    pub forwards: bool,
}

/// Whether a device is the container's way to everywhere.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// Only its routes lead to it.
    #[default]
    No,
    /// To everywhere, the networks included that the container is on.
    Everything,
    /// To everywhere but those.
    BesideLan,
}

/// Brings the device `name` in `netns` into the state that `interface` describes, and up.
///
/// It may be called again, with the same state or another: addresses of global scope that are not
/// listed are removed, and so are routes of an earlier call. Other devices' addresses and routes,
/// and routes that a person added to this one, are left alone.
pub fn configure(netns: &Netns, name: &str, interface: &Interface) -> Result<(), Error> {
    netns.run(|| Device::open(name)?.configure(interface))?
}

/// What the device `name` in `netns` lacks of `interface`, in words: that it is up, an address, a
/// route. `None` when it has all of them. An error too says that something is missing.
pub fn missing(netns: &Netns, name: &str, interface: &Interface) -> Result<Option<String>, Error> {
    if !crate::is_up(netns, name)? {
        return Ok(Some("the device is down".into()));
    }
    netns.run(|| Device::open(name)?.missing(interface))?
}

/// Takes back what the device `name`, the container's tailnet device of number `index`, would leave
/// behind when it is gone while the container lives on: rules, forwarding, and the refusal to let
/// anything out by another way than its exit. Idempotent; the device may be gone.
pub fn release(netns: &Netns, name: &str, index: u32) -> Result<(), Error> {
    netns.run(|| {
        let refused = |change: &str, cause| Error::Refused {
            change: change.into(),
            device: name.into(),
            cause,
        };
        let netlink = Netlink::open().map_err(|cause| refused("open a netlink socket", cause))?;
        // Routes of a device that is not there go with it.
        let mut device = Device {
            name,
            index: 0,
            netlink,
        };
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            device.set_source_rule(family, index, None)?;
            device.set_dns_rules(family, index, false)?;
            device.set_exit(family, index, Exit::No)?;
        }
        masquerade::end(name).map_err(|cause| refused("end forwarding", cause))
    })?
}

/// Marks routes and rules as ours (rtm_protocol). Numbers above 4 are free to use, those in
/// iproute2's rt_protos are taken.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(84);

/// The kernel's default for IPv6 (IP6_RT_PRIO_USER), which it also uses in place of 0. IPv4's
/// default is 0.
const IPV6_METRIC: u32 = 1024;

/// The table that trapped DNS queries are routed by, of tailscale0; those of the others follow.
const DNS_TABLE: u32 = 5300;
/// The first of the preferences of the rules that trap DNS, three a device. They come after the
/// table of local addresses (0) and before the main one (32766).
const DNS_RULES: u32 = 5300;

/// The table with the routes of tailscale0 alone; those of the others follow. The first one has none,
/// because it comes first in the main table too.
const SOURCE_TABLE: u32 = 5100;
/// The first of the preferences of the rules that lead to them, one a device. They come before the
/// exits', which look into the main table.
const SOURCE_RULES: u32 = 5100;

/// The table with an exit's default route, of tailscale0; those of the others follow.
const EXIT_TABLE: u32 = 5200;
/// The first of the preferences of the rules that lead to an exit, three a device. They come before
/// those that trap DNS: an exit takes the queries too.
const EXIT_RULES: u32 = 5200;
/// The group (IFLA_GROUP) of tailnet devices, by which the networks of a tailnet are told from those
/// of the devices that nobody gave a group.
const GROUP: u32 = 84;
const NO_GROUP: u32 = 0;
/// Of the route that refuses what an exit cannot take: any device's route comes before it.
const REFUSAL_METRIC: u32 = 1 << 30;

/// A device in the calling thread's namespace.
struct Device<'a> {
    name: &'a str,
    index: u32,
    netlink: Netlink,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Route {
    destination: IpNet,
    source: IpAddr,
    metric: u32,
    table: u32,
}

impl Device<'_> {
    fn open(name: &str) -> Result<Device<'_>, Error> {
        let open = || Ok((if_nametoindex(name)?, Netlink::open()?));
        let (index, netlink) = open().map_err(|cause| Error::Refused {
            change: "find the device in the container, or a netlink socket".into(),
            device: name.into(),
            cause,
        })?;
        Ok(Device {
            name,
            index,
            netlink,
        })
    }

    fn configure(&mut self, interface: &Interface) -> Result<(), Error> {
        let addresses = possible(&interface.addresses);
        let has_ipv6 = has_ipv6();
        if addresses.len() < interface.addresses.len() {
            tracing::warn!(
                device = self.name,
                "this kernel has no IPv6: set up with IPv4 only"
            );
        }
        if addresses.iter().any(is_ipv6) {
            // Docker turns IPv6 off on a device to which it gives no IPv6 address itself.
            self.set_sysctl("ipv6", "disable_ipv6", "0")?;
        }
        // An answer to a trapped query comes from an address whose way back is not this device,
        // and so do packets of a second tailnet: a strict check would drop them. 2 is loose, and
        // the kernel takes the larger of a device's value and that of `all`.
        if read_sysctl("ipv4", "all", "rp_filter") == Some("1".into())
            || read_sysctl("ipv4", self.name, "rp_filter") == Some("1".into())
        {
            self.set_sysctl("ipv4", "rp_filter", "2")?;
        }
        self.set_up(interface.mtu)?;
        self.add_addresses(&addresses)?;
        self.set_routes(&routes(interface, &addresses))?;
        // Last: the kernel would take the source from IPv6 routes that have an address as theirs,
        // and they would stay as routes that nobody knows again.
        self.remove_other_addresses(&addresses)?;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let source = source(&addresses, family == AddressFamily::Inet6);
            let own = source.filter(|_| interface.index > 0);
            self.set_source_rule(family, interface.index, own)?;
            let trap_dns = interface.trap_dns && source.is_some();
            self.set_dns_rules(family, interface.index, trap_dns)?;
            // Of a family in which the tailnet has no address, too: it must not leave elsewhere.
            if family == AddressFamily::Inet || has_ipv6 {
                self.set_exit(family, interface.index, interface.exit)?;
            }
        }
        if interface.forwards {
            masquerade::begin(self.name).map_err(|cause| {
                let change = "make the container forward (it takes nf_tables, Linux 5.7 or later)";
                self.refused(change.into(), cause)
            })?;
        }
        Ok(())
    }

    fn missing(&mut self, interface: &Interface) -> Result<Option<String>, Error> {
        let addresses = possible(&interface.addresses);
        let present: Vec<IpNet> = self.addresses()?.into_iter().map(|(it, _)| it).collect();
        if let Some(address) = addresses.iter().find(|it| !present.contains(it)) {
            return Ok(Some(format!("the device has not the address {address}")));
        }
        let present = self.routes()?;
        let wanted = routes(interface, &addresses);
        let route = wanted.iter().find(|route| !present.contains(route));
        Ok(route.map(|route| format!("the route to {} is not there", route.destination)))
    }

    fn set_up(&mut self, mtu: u32) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes.push(LinkAttribute::Mtu(mtu));
        message.attributes.push(LinkAttribute::Group(GROUP));
        self.netlink
            .change(RouteNetlinkMessage::SetLink(message), 0)
            .map_err(|cause| self.refused(format!("set the MTU {mtu} and bring it up"), cause))
    }

    fn add_addresses(&mut self, wanted: &[IpNet]) -> Result<(), Error> {
        for address in wanted {
            let message = address_message(self.index, address);
            self.netlink
                .change(
                    RouteNetlinkMessage::NewAddress(message),
                    NLM_F_CREATE | NLM_F_REPLACE,
                )
                .map_err(|cause| self.refused(format!("add the address {address}"), cause))?;
        }
        Ok(())
    }

    fn remove_other_addresses(&mut self, wanted: &[IpNet]) -> Result<(), Error> {
        for (address, message) in self.addresses()? {
            if !wanted.contains(&address) {
                self.netlink
                    .change(RouteNetlinkMessage::DelAddress(message), 0)
                    .map_err(|cause| {
                        self.refused(format!("remove the address {address}"), cause)
                    })?;
            }
        }
        Ok(())
    }

    /// The device's addresses of global scope, as they are and as the kernel tells them.
    fn addresses(&mut self) -> Result<Vec<(IpNet, AddressMessage)>, Error> {
        let present = self
            .netlink
            .list(RouteNetlinkMessage::GetAddress(AddressMessage::default()))
            .map_err(|cause| self.refused("list the addresses".into(), cause))?;
        let own = |message| match message {
            RouteNetlinkMessage::NewAddress(message)
                if message.header.index == self.index
                    && message.header.scope == AddressScope::Universe =>
            {
                Some((address_of(&message)?, message))
            }
            _ => None,
        };
        Ok(present.into_iter().filter_map(own).collect())
    }

    /// The device's routes that are ours.
    fn routes(&mut self) -> Result<HashSet<Route>, Error> {
        let present = self
            .netlink
            .list(RouteNetlinkMessage::GetRoute(RouteMessage::default()))
            .map_err(|cause| self.refused("list the routes".into(), cause))?;
        let own = |message| match message {
            RouteNetlinkMessage::NewRoute(message) => Route::of_device(&message, self.index),
            _ => None,
        };
        Ok(present.into_iter().filter_map(own).collect())
    }

    fn set_routes(&mut self, wanted: &[Route]) -> Result<(), Error> {
        let present = self.routes()?;
        let wanted: HashSet<_> = wanted.iter().cloned().collect();
        for route in present.difference(&wanted) {
            let message = RouteNetlinkMessage::DelRoute(route.message(self.index));
            match self.netlink.change(message, 0) {
                // The kernel takes a route away with its address.
                Err(cause) if cause.raw_os_error() == Some(libc::ESRCH) => {}
                result => result.map_err(|cause| {
                    self.refused(format!("remove the route to {}", route.destination), cause)
                })?,
            }
        }
        for route in wanted.difference(&present) {
            // Where another device has the very same route, ours comes after it: the networks that
            // a container is on itself come before those that are reached through a peer.
            self.netlink
                .change(
                    RouteNetlinkMessage::NewRoute(route.message(self.index)),
                    NLM_F_CREATE | NLM_F_APPEND,
                )
                .map_err(|cause| {
                    self.refused(format!("add the route to {}", route.destination), cause)
                })?;
        }
        Ok(())
    }

    /// What leaves by this address of the device's finds the device's routes before those of the
    /// others: an answer goes back by the way that the question came. Without an address what there
    /// was is removed; the first device never has one. A rule that outlives its device leads to an
    /// empty table, and changes nothing.
    fn set_source_rule(
        &mut self,
        family: AddressFamily,
        index: u32,
        address: Option<IpAddr>,
    ) -> Result<(), Error> {
        let present = match index {
            0 => Vec::new(),
            _ => self.sources(family, index)?,
        };
        let others = present.iter().filter(|it| Some(**it) != address);
        let gone = others.map(|other| (*other, false));
        let new = address.filter(|it| !present.contains(it));
        for (address, wanted) in gone.chain(new.map(|address| (address, true))) {
            let rule = source_rule(index, address);
            set_rule(&mut self.netlink, rule, wanted).map_err(|cause| {
                self.refused("set the rule that leads answers back by it".into(), cause)
            })?;
        }
        Ok(())
    }

    /// The addresses that such rules are for.
    fn sources(&mut self, family: AddressFamily, index: u32) -> Result<Vec<IpAddr>, Error> {
        let mut request = RuleMessage::default();
        request.header.family = family;
        let present = match self.netlink.list(RouteNetlinkMessage::GetRule(request)) {
            Err(cause) if is_done(&cause, false) => return Ok(Vec::new()),
            present => present.map_err(|cause| self.refused("list the rules".into(), cause))?,
        };
        let own = |message| match message {
            RouteNetlinkMessage::NewRule(rule) => source_of(&rule, index),
            _ => None,
        };
        Ok(present.into_iter().filter_map(own).collect())
    }

    /// Rules outlive the device. Without it their table is empty, and they change nothing.
    fn set_dns_rules(
        &mut self,
        family: AddressFamily,
        index: u32,
        trap: bool,
    ) -> Result<(), Error> {
        for rule in dns_rules(family, index) {
            set_rule(&mut self.netlink, rule, trap).map_err(|cause| {
                self.refused("set the rule that catches DNS queries".into(), cause)
            })?;
        }
        Ok(())
    }

    /// Leads everything to the device, or nothing more. What it cannot take, because it is gone or
    /// has no address of the family, is refused: nothing leaves by another way.
    fn set_exit(&mut self, family: AddressFamily, index: u32, exit: Exit) -> Result<(), Error> {
        let refused = |cause| Error::Refused {
            change: "lead everything to the exit node".into(),
            device: self.name.into(),
            cause,
        };
        let wanted = exit_rules(family, index, exit);
        set_refusal(&mut self.netlink, family, index, exit != Exit::No).map_err(refused)?;
        for rule in &wanted {
            set_rule(&mut self.netlink, rule.clone(), true).map_err(refused)?;
        }
        for other in [Exit::Everything, Exit::BesideLan] {
            for rule in exit_rules(family, index, other) {
                if !wanted.contains(&rule) {
                    set_rule(&mut self.netlink, rule, false).map_err(refused)?;
                }
            }
        }
        Ok(())
    }

    fn set_sysctl(&self, family: &str, key: &str, value: &str) -> Result<(), Error> {
        // Only where it changes something: /proc/sys is read-only in many a sandbox.
        if read_sysctl(family, self.name, key).as_deref() == Some(value) {
            return Ok(());
        }
        let path = format!("/proc/sys/net/{family}/conf/{}/{key}", self.name);
        fs::write(&path, value)
            .map_err(|cause| self.refused(format!("write {value} to {path}"), cause))
    }

    fn refused(&self, change: String, cause: io::Error) -> Error {
        Error::Refused {
            change,
            device: self.name.to_owned(),
            cause,
        }
    }
}

/// Adds or removes a rule; one that is so already is right.
fn set_rule(netlink: &mut Netlink, rule: RuleMessage, wanted: bool) -> io::Result<()> {
    if wanted {
        let rule = RouteNetlinkMessage::NewRule(rule);
        done(netlink.change(rule, NLM_F_CREATE | NLM_F_EXCL), wanted)
    } else {
        done(
            netlink.change(RouteNetlinkMessage::DelRule(rule), 0),
            wanted,
        )
    }
}

/// Adds or removes the route that refuses what an exit cannot take.
fn set_refusal(
    netlink: &mut Netlink,
    family: AddressFamily,
    index: u32,
    wanted: bool,
) -> io::Result<()> {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.protocol = PROTOCOL;
    message.header.kind = RouteType::Unreachable;
    message.attributes = vec![
        RouteAttribute::Table(EXIT_TABLE + index),
        RouteAttribute::Priority(REFUSAL_METRIC),
    ];
    if wanted {
        let route = RouteNetlinkMessage::NewRoute(message);
        done(netlink.change(route, NLM_F_CREATE | NLM_F_EXCL), wanted)
    } else {
        done(
            netlink.change(RouteNetlinkMessage::DelRoute(message), 0),
            wanted,
        )
    }
}

/// What was so before is no failure; and a kernel without the family, or without rules, has none to
/// remove.
fn done(result: io::Result<()>, wanted: bool) -> io::Result<()> {
    match result {
        Err(cause) if is_done(&cause, wanted) => Ok(()),
        result => result,
    }
}

fn is_done(cause: &io::Error, wanted: bool) -> bool {
    let done_before: &[i32] = match wanted {
        true => &[libc::EEXIST],
        false => &[
            libc::ENOENT,
            libc::ESRCH,
            libc::EAFNOSUPPORT,
            libc::EOPNOTSUPP,
        ],
    };
    cause
        .raw_os_error()
        .is_some_and(|error| done_before.contains(&error))
}

fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// Those of the addresses that this kernel knows the family of.
fn possible(addresses: &[IpNet]) -> Vec<IpNet> {
    let ipv6 = has_ipv6();
    let possible = addresses.iter().filter(|it| ipv6 || !is_ipv6(it));
    possible.copied().collect()
}

/// All the routes that a device needs.
fn routes(interface: &Interface, addresses: &[IpNet]) -> Vec<Route> {
    let index = interface.index;
    let source = |ipv6| source(addresses, ipv6);
    let to = |table: u32, metric: u32| {
        let destinations = interface.routes.iter();
        destinations.filter_map(move |destination| {
            let ipv6 = is_ipv6(destination);
            Some(Route {
                destination: destination.trunc(),
                source: source(ipv6)?,
                metric: metric + if ipv6 { IPV6_METRIC } else { 0 },
                table,
            })
        })
    };
    let main = to(RouteHeader::RT_TABLE_MAIN.into(), index);
    let own = to(SOURCE_TABLE + index, 0).filter(|_| index > 0);
    let tables = [
        (DNS_TABLE, interface.trap_dns),
        (EXIT_TABLE, interface.exit != Exit::No),
    ];
    let defaults = tables.into_iter().filter(|(_, wanted)| *wanted);
    let defaults = defaults.flat_map(|(table, _)| [(table, false), (table, true)]);
    let defaults = defaults.filter_map(|(table, ipv6)| {
        Some(Route {
            destination: everywhere(ipv6),
            source: source(ipv6)?,
            metric: if ipv6 { IPV6_METRIC } else { 0 },
            table: table + index,
        })
    });
    main.chain(own).chain(defaults).collect()
}

/// The address that packets of this family leave by.
fn source(addresses: &[IpNet], ipv6: bool) -> Option<IpAddr> {
    let mut addresses = addresses.iter().map(IpNet::addr);
    addresses.find(|address| address.is_ipv6() == ipv6)
}

impl Route {
    fn message(&self, device: u32) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = family_of(self.source);
        message.header.destination_prefix_length = self.destination.prefix_len();
        message.header.protocol = PROTOCOL;
        message.header.kind = RouteType::Unicast;
        message.header.scope = if self.source.is_ipv6() {
            RouteScope::Universe
        } else {
            RouteScope::Link
        };
        message.attributes = vec![
            RouteAttribute::Table(self.table),
            RouteAttribute::Oif(device),
            RouteAttribute::PrefSource(self.source.into()),
            RouteAttribute::Priority(self.metric),
        ];
        if self.destination.prefix_len() > 0 {
            message
                .attributes
                .push(RouteAttribute::Destination(self.destination.addr().into()));
        }
        message
    }

    /// The route in a message from the kernel, if it is one of ours on this device.
    fn of_device(message: &RouteMessage, device: u32) -> Option<Route> {
        let header = &message.header;
        if header.protocol != PROTOCOL || !message.attributes.contains(&RouteAttribute::Oif(device))
        {
            return None;
        }
        let ip = |address: &RouteAddress| match *address {
            RouteAddress::Inet(ip) => Some(IpAddr::from(ip)),
            RouteAddress::Inet6(ip) => Some(IpAddr::from(ip)),
            _ => None,
        };
        let mut destination = everywhere(header.address_family == AddressFamily::Inet6).addr();
        let mut source = None;
        let mut metric = 0;
        let mut table = header.table.into();
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => destination = ip(address)?,
                RouteAttribute::PrefSource(address) => source = ip(address),
                RouteAttribute::Priority(value) => metric = *value,
                RouteAttribute::Table(value) => table = *value,
                _ => {}
            }
        }
        Some(Route {
            destination: IpNet::new(destination, header.destination_prefix_length).ok()?,
            source: source?,
            metric,
            table,
        })
    }
}

/// The rule that leads what this address sends to the table with the device's routes alone.
fn source_rule(index: u32, address: IpAddr) -> RuleMessage {
    let mut rule = rule(
        family_of(address),
        SOURCE_RULES + index,
        SOURCE_TABLE + index,
        &[RuleAttribute::Source(address)],
    );
    rule.header.src_len = if address.is_ipv6() { 128 } else { 32 };
    rule
}

/// The address of such a rule of this device's; none of any other rule.
fn source_of(rule: &RuleMessage, index: u32) -> Option<IpAddr> {
    let has = |attribute| rule.attributes.contains(&attribute);
    let is_ours = has(RuleAttribute::Priority(SOURCE_RULES + index))
        && has(RuleAttribute::Table(SOURCE_TABLE + index))
        && has(RuleAttribute::Protocol(PROTOCOL));
    let mut sources = rule.attributes.iter().filter_map(|it| match it {
        RuleAttribute::Source(address) => Some(*address),
        _ => None,
    });
    sources.next().filter(|_| is_ours)
}

/// The rules that send DNS queries to the device's own table, unless the main table has a better
/// way to the server than its default route.
fn dns_rules(family: AddressFamily, index: u32) -> [RuleMessage; 3] {
    let at = |position| DNS_RULES + 3 * index + position;
    let to_port_53 = |protocol| {
        [
            RuleAttribute::IpProtocol(protocol),
            RuleAttribute::DestinationPortRange(RulePortRange { start: 53, end: 53 }),
        ]
    };
    let (table, but_default) = (DNS_TABLE + index, [RuleAttribute::SuppressPrefixLen(0)]);
    [
        rule(
            family,
            at(0),
            RouteHeader::RT_TABLE_MAIN.into(),
            &but_default,
        ),
        rule(family, at(1), table, &to_port_53(IpProtocol::Udp)),
        rule(family, at(2), table, &to_port_53(IpProtocol::Tcp)),
    ]
}

/// The rules that send everything to the device's exit, but for what the main table has a better way
/// to than its default route: by a tailnet device, or where that is allowed by any.
fn exit_rules(family: AddressFamily, index: u32, exit: Exit) -> Vec<RuleMessage> {
    let at = |position| EXIT_RULES + 3 * index + position;
    let but_default = RuleAttribute::SuppressPrefixLen(0);
    // A rule is removed by its preference, so the two have different ones.
    let (first, better): (_, &[_]) = match exit {
        Exit::No => return Vec::new(),
        Exit::Everything => (
            at(0),
            &[but_default, RuleAttribute::SuppressIfGroup(NO_GROUP)],
        ),
        Exit::BesideLan => (at(1), &[but_default]),
    };
    vec![
        rule(family, first, RouteHeader::RT_TABLE_MAIN.into(), better),
        rule(family, at(2), EXIT_TABLE + index, &[]),
    ]
}

fn rule(
    family: AddressFamily,
    preference: u32,
    table: u32,
    selector: &[RuleAttribute],
) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family;
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(preference),
        RuleAttribute::Table(table),
        RuleAttribute::Protocol(PROTOCOL),
    ];
    message.attributes.extend_from_slice(selector);
    message
}

fn address_message(device: u32, address: &IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = device;
    message.header.family = family_of(address.addr());
    message.header.prefix_len = address.prefix_len();
    message.header.scope = AddressScope::Universe;
    message.attributes = vec![
        AddressAttribute::Local(address.addr()),
        AddressAttribute::Address(address.addr()),
        // The routes are ours to give. And nobody else can have the address, so it is usable at
        // once, without the second that duplicate detection would take.
        AddressAttribute::Flags(AddressFlags::Noprefixroute | AddressFlags::Nodad),
    ];
    message
}

fn address_of(message: &AddressMessage) -> Option<IpNet> {
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point device IFA_ADDRESS is the peer's and IFA_LOCAL the own; IPv6 has
            // no IFA_LOCAL without a peer.
            AddressAttribute::Local(ip) => found = Some(*ip),
            AddressAttribute::Address(ip) => found = found.or(Some(*ip)),
            _ => {}
        }
    }
    IpNet::new(found?, message.header.prefix_len).ok()
}

fn read_sysctl(family: &str, device: &str, key: &str) -> Option<String> {
    let value = fs::read_to_string(format!("/proc/sys/net/{family}/conf/{device}/{key}")).ok()?;
    Some(value.trim().to_owned())
}

fn is_ipv6(net: &IpNet) -> bool {
    matches!(net, IpNet::V6(_))
}

fn family_of(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv6() {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    }
}

fn everywhere(ipv6: bool) -> IpNet {
    if ipv6 {
        Ipv6Net::default().into()
    } else {
        Ipv4Net::default().into()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    fn interface(addresses: &[&str], routes: &[&str], index: u32, trap_dns: bool) -> Interface {
        let parse = |nets: &[&str]| nets.iter().map(|net| net.parse().unwrap()).collect();
        Interface {
            addresses: parse(addresses),
            routes: parse(routes),
            mtu: 1280,
            index,
            trap_dns,
            exit: Exit::No,
            forwards: false,
        }
    }

    #[test]
    fn a_route_needs_an_address_of_its_family() {
        let interface = interface(
            &["100.64.0.1/32"],
            &["100.64.0.0/10", "fd7a:115c:a1e0::/48"],
            0,
            true,
        );
        assert_eq!(
            routes_of(&interface),
            [
                ("100.64.0.0/10".into(), 254),
                ("0.0.0.0/0".into(), DNS_TABLE)
            ]
        );
    }

    #[test]
    fn the_second_tailnet_comes_after_the_first_in_both_families() {
        let metrics = |index| {
            let interface = interface(
                &["100.64.0.1/32", "fd7a:115c:a1e0::1/128"],
                &["100.64.0.0/10", "fd7a:115c:a1e0::/48"],
                index,
                false,
            );
            routes(&interface, &interface.addresses)
                .iter()
                .filter(|route| route.table == 254)
                .map(|route| route.metric)
                .collect::<Vec<_>>()
        };
        // 0 would not do for IPv6: the kernel reads it as 1024, and 1 would then win.
        assert_eq!(metrics(0), [0, 1024]);
        assert_eq!(metrics(1), [1, 1025]);
    }

    #[test]
    fn what_leaves_by_an_address_of_a_second_tailnet_finds_its_routes_first() {
        let own = |index| {
            let routes = ["100.64.0.0/10", "100.64.0.7/32"];
            let interface = interface(&["100.64.0.1/32"], &routes, index, false);
            let mut routes = routes_of(&interface);
            routes.retain(|(_, table)| *table != 254);
            routes
        };
        assert_eq!(own(0), []);
        let second = [("100.64.0.0/10", 5102), ("100.64.0.7/32", 5102)];
        assert_eq!(own(2), second.map(|(net, table)| (net.to_owned(), table)));

        for address in ["100.64.0.1", "fd7a:115c:a1e0::1"] {
            let address = address.parse().unwrap();
            let rule = source_rule(2, address);
            assert_eq!(source_of(&rule, 2), Some(address));
            assert_eq!(source_of(&rule, 1), None);
        }
        let theirs = rule(AddressFamily::Inet, SOURCE_RULES + 2, 254, &[]);
        assert_eq!(source_of(&theirs, 2), None);
    }

    fn routes_of(interface: &Interface) -> Vec<(String, u32)> {
        let routes = routes(interface, &interface.addresses).into_iter();
        let pairs = routes.map(|route| (route.destination.to_string(), route.table));
        pairs.collect()
    }

    #[test]
    fn an_exit_is_a_default_route_of_its_own_for_each_address() {
        let interface = Interface {
            exit: Exit::BesideLan,
            ..interface(&["100.64.0.1/32"], &[], 1, false)
        };
        assert_eq!(
            routes_of(&interface),
            [("0.0.0.0/0".into(), EXIT_TABLE + 1)]
        );
    }

    #[test]
    fn two_devices_share_no_rule_and_no_table() {
        let keys = |index| {
            let family = AddressFamily::Inet;
            let exit = exit_rules(family, index, Exit::Everything);
            let source = source_rule(index, Ipv4Addr::LOCALHOST.into());
            let rules = dns_rules(family, index).into_iter().chain(exit);
            let rules = rules.chain([source]);
            rules
                .map(|rule| rule.attributes[0].clone())
                .collect::<Vec<_>>()
        };
        assert!(keys(0).iter().all(|key| !keys(1).contains(key)));
    }

    proptest! {
        #[test]
        fn a_route_is_read_back_as_it_was_written(
            ip: IpAddr,
            length in 0..=32_u8,
            metric: u32,
            table in 1..10_000_u32,
            device: u32,
        ) {
            let route = Route {
                destination: IpNet::new(ip, length).unwrap().trunc(),
                source: ip,
                metric,
                table,
            };
            let message = route.message(device);
            prop_assert_eq!(Route::of_device(&message, device), Some(route));
            prop_assert_eq!(Route::of_device(&message, device.wrapping_add(1)), None);
        }

        #[test]
        fn an_address_is_read_back_as_it_was_written(ip: IpAddr, length in 0..=32_u8) {
            let address = IpNet::new(ip, length).unwrap();
            prop_assert_eq!(address_of(&address_message(7, &address)), Some(address));
        }
    }
}
