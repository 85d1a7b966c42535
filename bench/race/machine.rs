//! Who sends and who receives: a namespace with an app in it, and what carries its packets.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    net::IpAddr,
    os::unix::net::UnixStream,
    process::Command,
    sync::Arc,
    time::Duration,
};

use tailnode_tests::{
    Container, Gopher, Host, Namespace, Process, Release, Tailnet, Underlay, eventually,
};
use tailnode_wire::keys::{ExportableKey as _, NodeKeyPair};
use tempfile::TempDir;

use crate::{contender::Contender, floor};

/// How long a machine may take to find its way to another.
const PATIENCE: Duration = Duration::from_secs(30);
/// The UDP port of those that have no control server to tell it.
const PORT: u16 = 51820;
/// What a tailnet's devices have, and so everybody's.
const MTU: u32 = 1280;

/// A place where an app runs.
pub struct Machine {
    /// Where the other reaches it.
    pub address: IpAddr,
    carrier: Carrier,
}

enum Carrier {
    Ours(Arc<Host>, Container),
    Tailscaled(Gopher),
    WireguardGo(Daemon, Namespace),
    Floor {
        daemon: Daemon,
        container: Namespace,
        host: Namespace,
    },
    Veth(Namespace),
}

struct Daemon {
    // Goes before the directory that its log is in.
    process: Process,
    _directory: TempDir,
}

impl Daemon {
    fn spawn(command: Command) -> Daemon {
        let directory = TempDir::new().expect("a directory for the log");
        Daemon {
            process: Process::spawn(command, directory.path().join("test.log")),
            _directory: directory,
        }
    }
}

impl Machine {
    /// A new container of this host, on its tailnet.
    pub fn ours(host: &Arc<Host>, name: &str) -> Machine {
        Machine::attach(host, Container::new(name))
    }

    /// A container that was on it before, or is to be now.
    pub fn attach(host: &Arc<Host>, container: Container) -> Machine {
        let answer = host.attach(&container).expect("attach the container");
        let subnets = &answer["interfaces"]["tailscale0"]["subnets"];
        let address = subnets[0]["ipnet"].as_str().expect("an address");
        let (address, _) = address.split_once('/').expect("a network");
        Machine {
            address: address.parse().expect("an address"),
            carrier: Carrier::Ours(host.clone(), container),
        }
    }

    /// A namespace with Tailscale's own daemon in it.
    pub fn tailscaled(gopher: Gopher) -> Machine {
        Machine {
            address: gopher.addresses[0],
            carrier: Carrier::Tailscaled(gopher),
        }
    }

    /// Where its app runs.
    pub fn inside(&self) -> &Namespace {
        match &self.carrier {
            Carrier::Ours(_, container) => container,
            Carrier::Tailscaled(gopher) => gopher,
            Carrier::Floor { container, .. } => container,
            Carrier::WireguardGo(_, namespace) | Carrier::Veth(namespace) => namespace,
        }
    }

    /// Where its datagrams leave.
    pub fn outside(&self) -> &Namespace {
        match &self.carrier {
            Carrier::Ours(host, _) => &host.namespace,
            Carrier::Floor { host, .. } => host,
            _ => self.inside(),
        }
    }

    /// The process that carries its packets.
    pub fn daemon(&self) -> Option<u32> {
        match &self.carrier {
            Carrier::Ours(host, _) => Some(host.daemon_id()),
            Carrier::Tailscaled(gopher) => Some(gopher.daemon_id()),
            Carrier::WireguardGo(daemon, _) | Carrier::Floor { daemon, .. } => {
                Some(daemon.process.id())
            }
            Carrier::Veth(_) => None,
        }
    }

    /// Ends its container; the parts to start it again.
    pub fn stop(self) -> Option<Stopped> {
        match self.carrier {
            Carrier::Ours(host, container) => {
                host.detach(&container).expect("detach the container");
                Some(Stopped::Ours(host, container))
            }
            Carrier::Tailscaled(mut gopher) => {
                gopher.stop();
                Some(Stopped::Tailscaled(gopher))
            }
            _ => None,
        }
    }

    /// Waits until packets to the other pass, and by no relay.
    pub fn reaches(&self, other: &Machine) {
        eventually("a packet passes", PATIENCE, || {
            let patience = Duration::from_secs(1);
            let ping = self.inside().ping_within(other.address, patience);
            ping.is_ok()
        });
        match &self.carrier {
            Carrier::Tailscaled(gopher) => {
                gopher
                    .pings_directly(other.address, 15)
                    .expect("a direct path");
            }
            Carrier::Ours(host, container) => {
                eventually("the path is direct", PATIENCE, || {
                    let status = host.status_of(container).unwrap_or_default();
                    let mut peers = status["node"]["peers"].as_array().into_iter().flatten();
                    let address = other.address.to_string();
                    peers.any(|peer| {
                        let addresses = peer["addresses"].as_array();
                        let mut addresses = addresses.into_iter().flatten();
                        addresses.any(|it| *it == *address) && peer["path"]["via"] != "relay"
                    })
                });
            }
            _ => {}
        }
    }
}

/// What is left of a machine that stopped.
pub enum Stopped {
    Ours(Arc<Host>, Container),
    Tailscaled(Gopher),
}

/// Two machines that reach one another, and all that they need for it.
pub struct Pair {
    pub near: Machine,
    pub far: Machine,
    _control: Option<Tailnet>,
    _underlay: Underlay,
}

impl Pair {
    /// On two hosts, joined by a router.
    pub fn start(contender: Contender) -> Pair {
        let underlay = Underlay::new();
        let control = contender.is_node().then(|| control(&underlay));
        let (near, far) = match (contender, &control) {
            (Contender::Ours, Some((tailnet, key))) => {
                let machine = |name| {
                    let host = Host::start(&underlay, tailnet, key);
                    Machine::ours(&Arc::new(host), name)
                };
                (machine("near"), machine("far"))
            }
            (Contender::Tailscaled(release), Some((tailnet, key))) => {
                let machine = |name| gopher(release, &underlay, tailnet, key, name);
                (machine("near"), machine("far"))
            }
            (Contender::WireguardGo, _) => wireguard_go(&underlay),
            (Contender::Floor, _) => floor(&underlay),
            _ => {
                let machine = || {
                    let namespace = underlay.host();
                    Machine {
                        address: address_on_underlay(&namespace),
                        carrier: Carrier::Veth(namespace),
                    }
                };
                (machine(), machine())
            }
        };
        Pair::meet(near, far, control, underlay)
    }

    /// Two containers of one host; for a sidecar that is two namespaces as well, and what is
    /// between them is the bridge.
    pub fn start_on_one_host(contender: Contender) -> Pair {
        if contender != Contender::Ours {
            return Pair::start(contender);
        }
        let underlay = Underlay::new();
        let (tailnet, key) = control(&underlay);
        let host = Arc::new(Host::start(&underlay, &tailnet, &key));
        let (near, far) = (Machine::ours(&host, "near"), Machine::ours(&host, "far"));
        Pair::meet(near, far, Some((tailnet, key)), underlay)
    }

    fn meet(
        near: Machine,
        far: Machine,
        control: Option<(Tailnet, String)>,
        underlay: Underlay,
    ) -> Pair {
        near.reaches(&far);
        far.reaches(&near);
        Pair {
            near,
            far,
            _control: control.map(|(tailnet, _)| tailnet),
            _underlay: underlay,
        }
    }

    /// The processes that carry the packets of either.
    pub fn daemons(&self) -> Vec<u32> {
        let mut daemons: Vec<u32> = [&self.near, &self.far]
            .into_iter()
            .filter_map(Machine::daemon)
            .collect();
        daemons.dedup();
        daemons
    }

    /// From now on the kernel cuts what leaves into single datagrams, as a card does that knows no
    /// UDP segmentation. (Between namespaces trains of datagrams pass uncut, which flatters all.)
    pub fn forbid_trains(&self) {
        for machine in [&self.near, &self.far] {
            machine.outside().ip("link set dev eth0 gso_max_segs 1");
        }
    }
}

/// A tailnet on the underlay's router, and a key to join it by.
pub fn control(underlay: &Underlay) -> (Tailnet, String) {
    let tailnet = Tailnet::start(underlay, 8080, "bench.internal");
    let key = tailnet.key(&["--reusable"]);
    (tailnet, key)
}

/// A new machine of Tailscale's, on a host of its own.
pub fn gopher(
    release: Release,
    underlay: &Underlay,
    tailnet: &Tailnet,
    key: &str,
    name: &str,
) -> Machine {
    let joined = Gopher::join_as(release, underlay.host(), &tailnet.url(), key, name);
    Machine::tailscaled(joined.expect("tailscale up"))
}

fn address_on_underlay(host: &Namespace) -> IpAddr {
    let addresses = host.ip_json("-4 address show dev eth0");
    let address = addresses[0]["addr_info"][0]["local"].as_str();
    let address = address.expect("an address on the underlay");
    address.parse().expect("an address")
}

fn wireguard_go(underlay: &Underlay) -> (Machine, Machine) {
    let hosts = [underlay.host(), underlay.host()];
    let outside = [
        address_on_underlay(&hosts[0]),
        address_on_underlay(&hosts[1]),
    ];
    let secrets = [(); 2].map(|()| NodeKeyPair::random());
    let mut machines = hosts.into_iter().enumerate().map(|(me, host)| {
        let mut command = host.command("unshare");
        // It takes commands at a path that is fixed, and so has a /run of its own.
        command
            .args(["--mount", "sh", "-ec"])
            .arg("mount -t tmpfs tmpfs /run; exec \"$@\"")
            .arg("sh")
            .arg(Release::Newest.program("wireguard"))
            .args(["--foreground", "wg0"]);
        let daemon = Daemon::spawn(command);
        let other = 1 - me;
        let settings = format!(
            "set=1\nprivate_key={}\nlisten_port={PORT}\npublic_key={}\nendpoint={}:{PORT}\n\
             allowed_ip=0.0.0.0/0\n\n",
            hex(secrets[me].private.export().as_bytes()),
            hex(secrets[other].public.export().as_bytes()),
            outside[other],
        );
        let socket = format!("/proc/{}/root/run/wireguard/wg0.sock", daemon.process.id());
        let mut stream = None;
        eventually("wireguard-go answers", PATIENCE, || {
            stream = UnixStream::connect(&socket).ok();
            stream.is_some()
        });
        let mut stream = stream.expect("a connection");
        stream.write_all(settings.as_bytes()).expect("set it up");
        let mut answer = String::new();
        let mut lines = BufReader::new(stream);
        lines.read_line(&mut answer).expect("its answer");
        assert_eq!(answer, "errno=0\n", "wireguard-go refused its settings");
        let address = put_up(&host, "wg0", me);
        Machine {
            address,
            carrier: Carrier::WireguardGo(daemon, host),
        }
    });
    let mut next = || machines.next().expect("two machines");
    (next(), next())
}

fn floor(underlay: &Underlay) -> (Machine, Machine) {
    let hosts = [underlay.host(), underlay.host()];
    let outside = [
        address_on_underlay(&hosts[0]),
        address_on_underlay(&hosts[1]),
    ];
    let mut machines = hosts.into_iter().enumerate().map(|(me, host)| {
        let container = Namespace::new();
        let myself = env::current_exe().expect("this program's path");
        let mut command = host.command(myself);
        command
            .arg("floor")
            .arg(container.path())
            .arg(outside[1 - me].to_string());
        let daemon = Daemon::spawn(command);
        let device = floor::DEVICE;
        eventually("the floor has a device", PATIENCE, || {
            container.links().iter().any(|name| name == device)
        });
        let address = put_up(&container, device, me);
        Machine {
            address,
            carrier: Carrier::Floor {
                daemon,
                container,
                host,
            },
        }
    });
    let mut next = || machines.next().expect("two machines");
    (next(), next())
}

/// Gives the device of one of two machines its address.
fn put_up(namespace: &Namespace, device: &str, number: usize) -> IpAddr {
    let address = IpAddr::from([10, 77, 0, 1 + number as u8]);
    namespace.ip(&format!("address add {address}/24 dev {device}"));
    namespace.ip(&format!("link set {device} mtu {MTU} up"));
    address
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
