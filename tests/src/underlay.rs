use std::{
    cell::Cell,
    io,
    net::{Ipv4Addr, TcpListener},
};

use crate::{Namespace, Wire};

/// The network below the tailnet: a router, and hosts that reach one another only through it.
pub struct Underlay {
    pub(crate) router: Namespace,
    hosts: Cell<u8>,
}

impl Underlay {
    /// The router's address, where the coordination servers listen.
    pub const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);

    /// Another address of the router's, for a relay of its own.
    pub const RELAY: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

    /// A router, and no hosts yet.
    #[allow(
        clippy::new_without_default,
        reason = "a network is a thing, not a value"
    )]
    pub fn new() -> Underlay {
        let router = Namespace::new();
        router.sh("sysctl -qw net.ipv4.ip_forward=1");
        for address in [Underlay::ROUTER, Underlay::RELAY] {
            router.ip(&format!("address add {address}/32 dev lo"));
        }
        Underlay {
            router,
            hosts: Cell::new(0),
        }
    }

    /// The router, where the coordination servers run.
    pub fn router(&self) -> &Namespace {
        &self.router
    }

    /// A new host on a link of its own.
    pub fn host(&self) -> Namespace {
        let number = self.hosts.get() + 1;
        self.hosts.set(number);
        host(&self.router, number, &format!("10.9.{number}"))
    }

    /// A new host that has IPv6 as well, which the others of its kind reach.
    pub fn dual_host(&self) -> Namespace {
        let host = self.host();
        self.add_ipv6(&host);
        host
    }

    /// A new host at the end of a wire.
    pub fn wired_host(&self, wire: Wire) -> Namespace {
        let number = self.hosts.get() + 1;
        self.hosts.set(number);
        let (name, network) = (format!("host{number}"), format!("10.9.{number}"));
        let host = Namespace::new();
        wire.join(&self.router, &name, &host);
        self.router
            .ip(&format!("address add {network}.1/24 dev {name}"));
        host.ip(&format!("address add {network}.2/24 dev eth0"));
        host.ip(&format!("route add default via {network}.1"));
        host
    }

    /// Gives the newest host IPv6 as well.
    pub fn add_ipv6(&self, host: &Namespace) {
        let number = self.hosts.get();
        let (gateway, address) = (
            format!("2001:db8:{number}::1"),
            format!("2001:db8:{number}::2"),
        );
        self.router.sh("sysctl -qw net.ipv6.conf.all.forwarding=1");
        self.router
            .ip(&format!("address add {gateway}/64 dev host{number} nodad"));
        host.ip(&format!("address add {address}/64 dev eth0 nodad"));
        host.ip(&format!("route add default via {gateway}"));
    }

    /// A new router with hosts of its own behind it, all of whom have its address outside.
    pub fn nat(&self) -> Nat {
        let router = self.host();
        router.sh("sysctl -qw net.ipv4.ip_forward=1");
        // A port of an inner host is open only to whom that host has sent from it. The router itself
        // must take nothing: a packet that it did would occupy the flow that the host opens next.
        for line in [
            "add table ip nat",
            "add chain ip nat leaving { type nat hook postrouting priority 100 ; }",
            "add rule ip nat leaving oifname eth0 masquerade",
            "add chain ip nat entering { type filter hook forward priority 0 ; }",
            "add rule ip nat entering iifname eth0 ct state new drop",
            "add chain ip nat taking { type filter hook input priority 0 ; }",
            "add rule ip nat taking iifname eth0 ct state new drop",
        ] {
            router.sh(&format!("nft {line}"));
        }
        Nat {
            router,
            gateway: format!("10.9.{}.1", self.hosts.get()),
            hosts: Cell::new(0),
        }
    }

    /// A port on the router that takes connections and never says anything on them.
    pub fn silent_listener(&self, port: u16) -> io::Result<TcpListener> {
        self.router
            .run(|| TcpListener::bind((Underlay::ROUTER, port)))
    }

    /// Lets nobody hear from the router that an IPv4 packet is too big for it.
    pub fn block_icmp(&self) {
        for line in [
            "add table ip silence",
            "add chain ip silence output { type filter hook output priority 0 ; }",
            "add rule ip silence output icmp type destination-unreachable drop",
        ] {
            self.router.sh(&format!("nft {line}"));
        }
    }

    /// Lets nothing by TCP reach the servers on the router, nor anything leave them: they are away,
    /// and nobody is told.
    pub fn silence_servers(&self) {
        for line in [
            "add table inet silence",
            "add chain inet silence input { type filter hook input priority 0 ; }",
            "add rule inet silence input iifname != lo meta l4proto tcp drop",
            "add chain inet silence output { type filter hook output priority 0 ; }",
            "add rule inet silence output oifname != lo meta l4proto tcp drop",
        ] {
            self.router.sh(&format!("nft {line}"));
        }
    }

    /// Ends what [`Underlay::silence_servers`] began.
    pub fn hear_servers(&self) {
        self.router.sh("nft delete table inet silence");
    }

    /// Lets nothing pass between hosts and the server of this URL, whose port is its last part.
    pub fn cut_off(&self, url: &str) {
        let port = url.rsplit(':').next().unwrap_or_default();
        self.router.sh("nft add table ip servers");
        self.router
            .sh("nft add chain ip servers input { type filter hook input priority 0 ; }");
        self.router.sh(&format!(
            "nft add rule ip servers input iifname host* tcp dport {port} drop"
        ));
    }

    /// Ends what [`Underlay::cut_off`] began.
    pub fn connect_again(&self) {
        self.router.sh("nft delete table ip servers");
    }

    /// Makes an address of the router's vanish: nothing that is sent there is answered.
    pub fn take_away(&self, address: Ipv4Addr) {
        self.router.sh("nft add table ip gone");
        self.router
            .sh("nft add chain ip gone input { type filter hook input priority 0 ; }");
        self.router.sh(&format!(
            "nft add rule ip gone input ip daddr {address} drop"
        ));
    }

    /// Lets no UDP over IPv4 pass from host to host, so that relays are left, and IPv6.
    pub fn block_udp(&self) {
        self.router.sh("nft add table ip underlay");
        self.router
            .sh("nft add chain ip underlay forward { type filter hook forward priority 0 ; }");
        self.router
            .sh("nft add rule ip underlay forward meta l4proto udp drop");
    }

    /// Ends what [`Underlay::block_udp`] began.
    pub fn unblock_udp(&self) {
        self.router.sh("nft delete table ip underlay");
    }
}

/// A router that hides the hosts behind it. Lives for as long as they are to be connected.
pub struct Nat {
    router: Namespace,
    gateway: String,
    hosts: Cell<u8>,
}

impl Nat {
    /// Forgets all that it has mapped: what the hosts send from now on has other ports outside.
    pub fn forget(&self) {
        for line in [
            "nft flush chain ip nat leaving",
            // Above those that it has given so far: it keeps a host's own port where it can.
            "nft add rule ip nat leaving oifname eth0 meta l4proto { tcp , udp } masquerade to :61000-65000",
            // With the address of a masquerade go its mappings.
            "ip link set eth0 down",
            "ip link set eth0 up",
        ] {
            self.router.sh(line);
        }
        self.router
            .ip(&format!("route add default via {}", self.gateway));
    }

    /// A new host behind it, on a link of its own.
    pub fn host(&self) -> Namespace {
        let number = self.hosts.get() + 1;
        self.hosts.set(number);
        host(&self.router, number, &format!("192.168.{number}"))
    }
}

/// A host whose only way anywhere is through the router.
fn host(router: &Namespace, number: u8, network: &str) -> Namespace {
    let host = Namespace::new();
    router.link(
        &format!("host{number}"),
        &format!("{network}.1/24"),
        &host,
        "eth0",
        &format!("{network}.2/24"),
    );
    host.ip(&format!("route add default via {network}.1"));
    host
}
