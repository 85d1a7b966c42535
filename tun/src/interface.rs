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

use crate::{Error, Netns, netlink::Netlink};

/// How a device shall be set up inside its container.
#[derive(Debug, Clone, PartialEq, Eq)]
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
}

/// Brings the device `name` in `netns` into the state that `interface` describes, and up.
///
/// It may be called again, with the same state or another: addresses of global scope that are not
/// listed are removed, and so are routes of an earlier call. Other devices' addresses and routes,
/// and routes that a person added to this one, are left alone.
pub fn configure(netns: &Netns, name: &str, interface: &Interface) -> Result<(), Error> {
    netns.run(|| Device::open(name)?.configure(interface))?
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
        let mut addresses = interface.addresses.clone();
        if addresses.iter().any(is_ipv6) && !Path::new("/proc/sys/net/ipv6").exists() {
            tracing::warn!(
                device = self.name,
                "this kernel has no IPv6: set up with IPv4 only"
            );
            addresses.retain(|address| !is_ipv6(address));
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
            let has_address = addresses
                .iter()
                .any(|address| family_of(address.addr()) == family);
            self.set_dns_rules(family, interface.index, interface.trap_dns && has_address)?;
        }
        Ok(())
    }

    fn set_up(&mut self, mtu: u32) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes.push(LinkAttribute::Mtu(mtu));
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
        let present = self
            .netlink
            .list(RouteNetlinkMessage::GetAddress(AddressMessage::default()))
            .map_err(|cause| self.refused("list the addresses".into(), cause))?;
        for message in present {
            let RouteNetlinkMessage::NewAddress(message) = message else {
                continue;
            };
            let header = &message.header;
            if header.index != self.index || header.scope != AddressScope::Universe {
                continue;
            }
            let Some(address) = address_of(&message) else {
                continue;
            };
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

    fn set_routes(&mut self, wanted: &[Route]) -> Result<(), Error> {
        let mut present = HashSet::new();
        for message in self
            .netlink
            .list(RouteNetlinkMessage::GetRoute(RouteMessage::default()))
            .map_err(|cause| self.refused("list the routes".into(), cause))?
        {
            if let RouteNetlinkMessage::NewRoute(message) = message {
                present.extend(Route::of_device(&message, self.index));
            }
        }
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

    /// Rules outlive the device. Without it their table is empty, and they change nothing.
    fn set_dns_rules(
        &mut self,
        family: AddressFamily,
        index: u32,
        trap: bool,
    ) -> Result<(), Error> {
        for rule in dns_rules(family, index) {
            let result = if trap {
                self.netlink.change(
                    RouteNetlinkMessage::NewRule(rule),
                    NLM_F_CREATE | NLM_F_EXCL,
                )
            } else {
                self.netlink.change(RouteNetlinkMessage::DelRule(rule), 0)
            };
            let done_before: &[i32] = match trap {
                true => &[libc::EEXIST],
                // A kernel without the family, or without rules, has none to remove either.
                false => &[libc::ENOENT, libc::EAFNOSUPPORT, libc::EOPNOTSUPP],
            };
            match result {
                Err(cause)
                    if cause
                        .raw_os_error()
                        .is_some_and(|e| done_before.contains(&e)) => {}
                result => result.map_err(|cause| {
                    self.refused("set the rule that catches DNS queries".into(), cause)
                })?,
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

/// All the routes that a device needs.
fn routes(interface: &Interface, addresses: &[IpNet]) -> Vec<Route> {
    let index = interface.index;
    let source = |ipv6| {
        addresses
            .iter()
            .map(IpNet::addr)
            .find(|ip| ip.is_ipv6() == ipv6)
    };
    let main = interface.routes.iter().filter_map(|destination| {
        let ipv6 = is_ipv6(destination);
        Some(Route {
            destination: destination.trunc(),
            source: source(ipv6)?,
            metric: index + if ipv6 { IPV6_METRIC } else { 0 },
            table: RouteHeader::RT_TABLE_MAIN.into(),
        })
    });
    let dns = [false, true].into_iter().filter_map(|ipv6| {
        Some(Route {
            destination: everywhere(ipv6),
            source: source(ipv6)?,
            metric: if ipv6 { IPV6_METRIC } else { 0 },
            table: DNS_TABLE + index,
        })
    });
    main.chain(dns.filter(|_| interface.trap_dns)).collect()
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

/// The rules that send DNS queries to the device's own table, unless the main table has a better
/// way to the server than its default route.
fn dns_rules(family: AddressFamily, index: u32) -> [RuleMessage; 3] {
    let rule = |position: u32, table: u32, selector: &[RuleAttribute]| {
        let mut message = RuleMessage::default();
        message.header.family = family;
        message.header.action = RuleAction::ToTable;
        message.attributes = vec![
            RuleAttribute::Priority(DNS_RULES + 3 * index + position),
            RuleAttribute::Table(table),
            RuleAttribute::Protocol(PROTOCOL),
        ];
        message.attributes.extend_from_slice(selector);
        message
    };
    let to_port_53 = |protocol| {
        [
            RuleAttribute::IpProtocol(protocol),
            RuleAttribute::DestinationPortRange(RulePortRange { start: 53, end: 53 }),
        ]
    };
    [
        rule(
            0,
            RouteHeader::RT_TABLE_MAIN.into(),
            &[RuleAttribute::SuppressPrefixLen(0)],
        ),
        rule(1, DNS_TABLE + index, &to_port_53(IpProtocol::Udp)),
        rule(2, DNS_TABLE + index, &to_port_53(IpProtocol::Tcp)),
    ]
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
        let routes: Vec<_> = routes(&interface, &interface.addresses)
            .into_iter()
            .map(|route| (route.destination.to_string(), route.table))
            .collect();
        assert_eq!(
            routes,
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
                .map(|route| route.metric)
                .collect::<Vec<_>>()
        };
        // 0 would not do for IPv6: the kernel reads it as 1024, and 1 would then win.
        assert_eq!(metrics(0), [0, 1024]);
        assert_eq!(metrics(1), [1, 1025]);
    }

    #[test]
    fn two_devices_share_no_rule_and_no_table() {
        let keys = |index| {
            dns_rules(AddressFamily::Inet, index)
                .map(|rule| rule.attributes[0].clone())
                .to_vec()
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
