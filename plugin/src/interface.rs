//! A container's device: what it should look like, and keeping it so.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tailnode_node::Reach;
use tailnode_tun::{Exit, Interface, Netns};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::{Error, api::Engine, inside::Change};

/// What a device is called in a container, before its number.
pub(crate) const PREFIX: &str = "tailscale";

/// Every node's resolver (net/tsaddr: TailscaleServiceIP and TailscaleServiceIPv6).
const RESOLVER_V4: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 100);
const RESOLVER_V6: Ipv6Addr = Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0x53);

/// Tailscale's default (net/tstun/mtu.go): what fits into WireGuard on any path of IPv6's minimum.
const MTU: u32 = 1280;

/// What every tailnet routes (net/tsaddr): all its IPv4 addresses with the resolver's among them,
/// and all its IPv6 addresses, likewise.
const TAILNET_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10);
const TAILNET_V6: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0), 48);

/// What decides how the device of a node is set up.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    /// The node's address in a network of this host alone.
    pub(crate) local: Option<IpNet>,
    /// The device's number in its container.
    pub(crate) index: u32,
    /// Who the node is, and what it reaches.
    pub(crate) reach: &'a Reach,
    /// What the container's tailnets reach that come before this one.
    pub(crate) taken: &'a HashSet<IpNet>,
    pub(crate) trap_dns: bool,
    pub(crate) exit: Exit,
    /// Whether the node offers routes.
    pub(crate) forwards: bool,
}

/// How the device of a node should be set up.
pub(crate) fn wanted(wanted: &Wanted) -> Interface {
    let mut routes = Vec::new();
    if wanted.reach.addresses.iter().any(IpAddr::is_ipv4) {
        routes.push(IpNet::from(TAILNET_V4));
    }
    if wanted.reach.addresses.iter().any(IpAddr::is_ipv6) {
        routes.push(IpNet::from(TAILNET_V6));
    }
    let free = |net: &&IpNet| !wanted.taken.contains(net);
    if wanted.index > 0 {
        // All tailnets use the same range, and the first has it: the others' peers need routes of
        // their own.
        routes.extend(wanted.reach.peers.iter().filter(free));
    }
    routes.extend(wanted.reach.subnets.iter().filter(free));
    // Behind the tailnet's, so that packets to the local network carry a tailnet address too.
    let addresses = wanted.reach.addresses.iter().copied();
    let addresses = addresses.chain(wanted.local.map(|local| local.addr()));
    routes.extend(wanted.local.map(|local| local.trunc()));
    Interface {
        addresses: addresses.map(IpNet::from).collect(),
        routes,
        mtu: MTU,
        index: wanted.index,
        trap_dns: wanted.trap_dns,
        exit: wanted.exit,
        forwards: wanted.forwards,
    }
}

/// The address of its resolver that a node's container is told. A second tailnet has another than
/// the first: when a container leaves one network, Podman takes that network's servers out of its
/// resolv.conf, and would take the ones of both.
pub(crate) fn resolver(interface: &Interface) -> IpAddr {
    let has_ipv6 = interface.addresses.iter().any(|own| own.addr().is_ipv6());
    if interface.index > 0 && has_ipv6 {
        RESOLVER_V6.into()
    } else {
        RESOLVER_V4.into()
    }
}

/// The device's number in its container, from its name.
pub(crate) fn index_of(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

/// Runs something that blocks for a moment.
pub(crate) async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(f).await {
        Ok(value) => value,
        // The job is never cancelled, so it panicked, and so do we.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// A device that is, or will be, in a container.
pub(crate) struct Device {
    pub(crate) tun: Arc<OwnedFd>,
    pub(crate) engine: Engine,
    /// Its number in its container, where its name does not tell it.
    pub(crate) number: Option<u32>,
    pub(crate) accepts_routes: bool,
    /// The namespace that it must never be set up in.
    pub(crate) host: (u64, u64),
}

impl Device {
    /// Sets the device up and keeps it so, until it is gone. `wanted` is asked anew, with the
    /// device's number, whenever `reach` changes.
    pub(crate) async fn keep(
        &self,
        mut reach: watch::Receiver<Reach>,
        wanted: impl Fn(u32) -> Interface,
    ) -> Result<(), Error> {
        // When to set the device up, in milliseconds from now.
        let (index, times): (u32, &[u64]) = match self.engine {
            // The shim sets the device up itself, right after our answer and without us in its
            // way; what it sets may be older than what we know by then.
            Engine::Podman | Engine::Cni => {
                let name = tailnode_tun::device_name(self.tun.as_fd())?;
                match self.index(&name) {
                    // The first has routes of its own only to subnets. One without an address may
                    // have been let in meanwhile.
                    Some(index)
                        if index > 0
                            || self.accepts_routes
                            || reach.borrow().addresses.is_empty() =>
                    {
                        (index, &[100, 2000])
                    }
                    Some(index) => (index, &[]),
                    None => return Ok(()),
                }
            }
            // Docker may turn IPv6 off on the device, depending on its version even after it has
            // brought it up. What is right already is not touched.
            Engine::Docker => (self.arrive().await?, &[0, 10, 60, 260, 1260]),
        };
        let began = Instant::now();
        let mut times = times
            .iter()
            .map(|&time| began + Duration::from_millis(time));
        let mut next = times.next();
        // The shim sets what is so now.
        let mut last = next.is_none().then(|| wanted(index));
        loop {
            let timed = tokio::select! {
                () = sleep_until(next.unwrap_or(began)), if next.is_some() => {
                    next = times.next();
                    true
                }
                changed = reach.changed(), if last.is_some() => match changed {
                    Ok(()) => false,
                    Err(_) => return Ok(()),
                },
            };
            let interface = wanted(index);
            if !timed && last.as_ref() == Some(&interface) {
                continue;
            }
            let applied = self.apply(interface.clone()).await;
            last = Some(interface);
            // One that fails because the engine was changing the same thing is followed by another.
            if next.is_none() {
                applied?;
            }
        }
    }

    fn index(&self, name: &str) -> Option<u32> {
        self.number.or_else(|| index_of(name))
    }

    /// Takes back what the device would leave behind in its container, which it is to leave.
    pub(crate) async fn release(&self) -> Result<(), Error> {
        if let Some((netns, name)) = self.place().await?
            && let Some(index) = self.index(&name)
        {
            let device = name;
            let change = Change::Release { device, index };
            blocking(move || change.make(&netns)).await?;
        }
        Ok(())
    }

    /// Waits until the shim has taken the device into the container: it tells of it first, because to
    /// move a device takes a kernel as long as a node takes to start.
    pub(crate) async fn moved(&self, deadline: Instant) -> Result<(), Error> {
        loop {
            let place = self.place().await?;
            if place.is_some_and(|(_, name)| self.index(&name).is_some()) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::DeviceNotMoved);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until Docker has moved the device into its container, renamed it, given it Docker's
    /// address and, last of all, brought it up. It does so right after its request to join is
    /// answered, and tells nobody. It must find no route of ours when it comes to the address: it
    /// takes one that covers its network for a conflict, and fails the start.
    async fn arrive(&self) -> Result<u32, Error> {
        let began = Instant::now();
        loop {
            if let Some((netns, name)) = self.place().await?
                && let Some(index) = index_of(&name)
                && is_up(netns, name).await
            {
                return Ok(index);
            }
            let pause = if began.elapsed() < Duration::from_secs(30) {
                2
            } else {
                100
            };
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn apply(&self, interface: Interface) -> Result<(), Error> {
        let Some((netns, device)) = self.place().await? else {
            // Docker has taken it back.
            return Ok(());
        };
        let change = Change::Configure { device, interface };
        blocking(move || change.make(&netns)).await
    }

    /// Where the device is and how it is called there; `None` while that is the host.
    async fn place(&self) -> Result<Option<(Netns, String)>, Error> {
        let (tun, host) = (self.tun.clone(), self.host);
        blocking(move || {
            let netns = Netns::of_device(tun.as_fd())?;
            if netns.id() == host {
                return Ok(None);
            }
            let name = tailnode_tun::device_name(tun.as_fd())?;
            Ok(Some((netns, name)))
        })
        .await
    }
}

async fn is_up(netns: Netns, name: String) -> bool {
    blocking(move || {
        tailnode_tun::is_up(&netns, &name).unwrap_or_else(|error| {
            // Renamed or taken away since: it is looked for again.
            tracing::debug!("{error}");
            false
        })
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn nets(nets: &[&str]) -> Vec<IpNet> {
        nets.iter().map(|net| net.parse().unwrap()).collect()
    }

    #[test]
    fn the_first_tailnet_has_the_range_and_the_second_its_peers() {
        let reach = Reach {
            addresses: vec![
                "100.64.0.1".parse().unwrap(),
                "fd7a:115c:a1e0::1".parse().unwrap(),
            ],
            peers: nets(&["100.64.0.2/32", "100.64.0.3/32"])
                .into_iter()
                .collect(),
            subnets: nets(&["10.1.0.0/24", "10.2.0.0/24"]).into_iter().collect(),
        };
        let nothing = HashSet::new();
        let plain = Wanted {
            local: None,
            index: 0,
            reach: &reach,
            taken: &nothing,
            trap_dns: false,
            exit: Exit::No,
            forwards: false,
        };
        let first = wanted(&plain);
        assert_eq!(
            first.addresses,
            nets(&["100.64.0.1/32", "fd7a:115c:a1e0::1/128"])
        );
        let range = ["100.64.0.0/10", "fd7a:115c:a1e0::/48"];
        let subnets = ["10.1.0.0/24", "10.2.0.0/24"];
        assert_eq!(first.routes, nets(&[range, subnets].concat()));

        let taken = nets(&["100.64.0.2/32", "10.2.0.0/24"])
            .into_iter()
            .collect();
        let one_address = Reach {
            addresses: reach.addresses[..1].to_vec(),
            ..reach.clone()
        };
        let second = wanted(&Wanted {
            reach: &one_address,
            index: 1,
            taken: &taken,
            trap_dns: true,
            exit: Exit::Everything,
            forwards: true,
            ..plain
        });
        assert_eq!(
            second.routes,
            nets(&["100.64.0.0/10", "100.64.0.3/32", "10.1.0.0/24"])
        );
        assert!(second.trap_dns && second.forwards && second.mtu == 1280);
        assert_eq!(second.exit, Exit::Everything);

        assert_eq!(resolver(&first), IpAddr::from(RESOLVER_V4));
        assert_eq!(resolver(&second), IpAddr::from(RESOLVER_V4));
        let third = wanted(&Wanted { index: 2, ..plain });
        assert_eq!(resolver(&third), IpAddr::from(RESOLVER_V6));

        let local = wanted(&Wanted {
            local: "172.19.0.2/16".parse().ok(),
            reach: &Reach {
                subnets: BTreeSet::new(),
                ..one_address
            },
            ..plain
        });
        assert_eq!(local.addresses, nets(&["100.64.0.1/32", "172.19.0.2/32"]));
        assert_eq!(local.routes, nets(&["100.64.0.0/10", "172.19.0.0/16"]));
    }

    #[test]
    fn numbers_are_read_off_names() {
        for (name, index) in [
            ("tailscale0", Some(0)),
            ("tailscale12", Some(12)),
            ("tailscale", None),
            ("tn0a1b2c3d", None),
            ("eth0", None),
        ] {
            assert_eq!(index_of(name), index, "{name}");
        }
    }
}
