//! What cases are made of: servers, machines, and what passes between them.

use std::{
    fmt,
    net::{IpAddr, TcpStream, UdpSocket},
    ops::Deref,
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use tailnode_tests::{Headscale, Host, Tailnet, Testcontrol, eventually};

pub use tailnode_tests::{
    Container, Delivery, Flow, Gopher, NameServer, Namespace, Underlay, Wire, noise,
};

/// A case with the servers that it is true under.
pub type Case = (&'static str, &'static [Server], fn(Server));

/// Who coordinates the tailnet of a case.
#[derive(Clone, Copy)]
pub enum Server {
    Ours,
    Headscale,
    Testcontrol,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            C => "tailnode-control",
            H => "headscale",
            T => "testcontrol",
        })
    }
}

pub use Server::{Headscale as H, Ours as C, Testcontrol as T};

pub const ALL: &[Server] = &[C, H, T];
/// Those with keys and logins of several kinds, and with a policy.
pub const WITH_KEYS: &[Server] = &[C, H];
pub const WITH_POLICY: &[Server] = &[C, H];

pub enum Control {
    Ours(Tailnet),
    Headscale(Headscale),
    Testcontrol(Testcontrol),
}

/// A server on the router of an underlay, and nobody there yet.
pub struct Scene {
    pub control: Control,
    pub underlay: Underlay,
}

impl Scene {
    pub fn new(server: Server) -> Scene {
        let underlay = Underlay::new();
        let control = match server {
            C => Control::Ours(Tailnet::start(&underlay, 8080, DOMAIN)),
            H => Control::Headscale(Headscale::start(&underlay, DOMAIN)),
            T => Control::Testcontrol(Testcontrol::start(&underlay, DOMAIN)),
        };
        Scene { control, underlay }
    }

    pub fn url(&self) -> String {
        match &self.control {
            Control::Ours(server) => server.url(),
            Control::Headscale(server) => server.url(),
            Control::Testcontrol(server) => server.url(),
        }
    }

    /// An auth key; the flags mean the same to both servers that have them.
    pub fn key(&self, flags: &[&str]) -> String {
        match &self.control {
            Control::Ours(server) => server.key(flags),
            Control::Headscale(server) => server.key(flags),
            Control::Testcontrol(_) => Testcontrol::KEY.to_owned(),
        }
    }

    pub fn key_for_a_second(&self) -> String {
        match self.control {
            Control::Ours(_) => self.key(&["--reusable", "--expires=1s"]),
            _ => self.key(&["--reusable", "--expiration=1s"]),
        }
    }

    pub fn tag_flags(&self, tag: &'static str) -> [&'static str; 2] {
        match self.control {
            Control::Ours(_) => ["--tag", tag],
            _ => ["--tags", tag],
        }
    }

    /// Calls the node of this name otherwise.
    pub fn rename(&self, name: &str, to: &str) {
        match &self.control {
            Control::Ours(server) => server.rename(name, to),
            Control::Headscale(server) => server.rename(name, to),
            Control::Testcontrol(server) => server.rename(&self.underlay, name, to),
        }
    }

    /// Lets a node in whose login page has this URL.
    pub fn approve(&self, page: &str) {
        match &self.control {
            Control::Ours(server) => server.approve(page),
            Control::Headscale(server) => server.approve(page),
            Control::Testcontrol(_) => panic!("testcontrol has no login page"),
        }
    }

    /// Lets every first reach every second (`ADDRESS:PORTS`), and nothing else.
    pub fn set_policy(&self, allowed: &[(String, String)]) {
        let rules = allowed
            .iter()
            .map(|(src, dst)| json!({ "action": "accept", "src": [src], "dst": [dst] }));
        self.enforce(&json!({ "acls": rules.collect::<Vec<_>>() }));
    }

    /// Replaces the policy by this one, a file of Tailscale's form.
    pub fn enforce(&self, policy: &Value) {
        let policy = policy.to_string();
        match &self.control {
            Control::Ours(server) => server.set_policy(&policy),
            Control::Headscale(server) => server.set_policy(&policy),
            Control::Testcontrol(_) => panic!("testcontrol has no policy"),
        }
    }

    /// A machine on a link of its own, seen by all others.
    pub fn host(&self) -> Namespace {
        self.underlay.host()
    }

    pub fn ours(&self, name: &str, key: &str, machine: Namespace) -> Ours {
        Ours::join(machine, &self.url(), key, name).unwrap()
    }

    pub fn gopher(&self, name: &str, key: &str, machine: Namespace) -> Gopher {
        Gopher::join(machine, &self.url(), key, name).unwrap()
    }

    /// Our `web` and their `gopher`, on these machines.
    pub fn pair(&self, ours: Namespace, theirs: Namespace) -> (Ours, Gopher) {
        let key = self.key(&["--reusable"]);
        (
            self.ours("web", &key, ours),
            self.gopher("gopher", &key, theirs),
        )
    }
}

/// A machine with one container, which has a node of ours.
pub struct Ours {
    pub container: Container,
    pub addresses: Vec<IpAddr>,
    pub host: Host,
}

impl Ours {
    pub fn join(machine: Namespace, url: &str, key: &str, name: &str) -> Result<Ours, String> {
        Ours::attach(
            Host::start_in(machine, url, Some(key)),
            Container::new(name),
        )
    }

    pub fn attach(host: Host, container: Container) -> Result<Ours, String> {
        let answer = host.attach(&container)?;
        let subnets = answer["interfaces"]["tailscale0"]["subnets"].as_array();
        let addresses = subnets.into_iter().flatten().map(|subnet| {
            let net: ipnet::IpNet = subnet["ipnet"].as_str().unwrap().parse().unwrap();
            net.addr()
        });
        Ok(Ours {
            addresses: addresses.collect(),
            container,
            host,
        })
    }

    /// How it sends to the peer of this name, in the words of its status; empty: it knows none.
    pub fn path_to(&self, peer: &str) -> String {
        let status = self.host.status_of(&self.container).unwrap_or_default();
        let full = format!("{peer}.{DOMAIN}");
        let peers = status["node"]["peers"].as_array();
        let found = peers
            .into_iter()
            .flatten()
            .find(|status| status["name"] == *full);
        let via = found.and_then(|peer| peer["path"]["via"].as_str());
        via.unwrap_or_default().to_owned()
    }
}

/// What a namespace's programs can do, the container's can.
impl Deref for Ours {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.container
    }
}

pub const DOMAIN: &str = "demo.internal";
pub const MAGIC_DNS: &str = "100.100.100.100:53";

/// One ping passes, after some time for news of the peer to arrive.
pub fn reach(from: &Namespace, addresses: &[IpAddr]) {
    for &address in addresses {
        within(10, &format!("{address} is reached"), || {
            passes(from, address)
        });
    }
}

/// Whether one ping passes, now.
pub fn passes(from: &Namespace, to: IpAddr) -> bool {
    from.ping_within(to, Duration::from_secs(1)).is_ok()
}

/// A datagram arrives within so many seconds, of many that are sent.
pub fn arrives(from: &Namespace, to: &Namespace, address: IpAddr, seconds: u64) {
    let bind = |namespace: &Namespace| namespace.run(|| UdpSocket::bind("[::]:0"));
    let (sender, receiver) = (bind(from).unwrap(), bind(to).unwrap());
    receiver.set_nonblocking(true).unwrap();
    let address = (address, receiver.local_addr().unwrap().port());
    within(
        seconds,
        &format!("a datagram reaches {}", address.0),
        || {
            sender.send_to(b"hello", address).unwrap();
            receiver.recv(&mut [0; 64]).is_ok()
        },
    );
}

/// Whether somebody listens at this port for all that one can see.
pub fn opens(from: &Namespace, to: IpAddr, port: u16) -> bool {
    let patience = Duration::from_secs(1);
    from.run(|| TcpStream::connect_timeout(&(to, port).into(), patience))
        .is_ok()
}

/// Both ends say that packets travel without a relay.
pub fn direct(web: &Ours, gopher: &Gopher) {
    reach(web, &gopher.addresses[..1]);
    gopher.pings_directly(web.addresses[0], 15).unwrap();
    within(15, "our end's path is direct", || {
        passes(web, gopher.addresses[0]) && web.path_to("gopher") == "direct"
    });
}

/// Both ends say that packets travel by a relay.
pub fn relayed(web: &Ours, gopher: &Gopher) {
    reach(web, &gopher.addresses[..1]);
    reach(gopher, &web.addresses[..1]);
    let pong = gopher.ping_once(web.addresses[0]).unwrap();
    assert!(pong.contains("via DERP"), "{pong}");
    assert_eq!(web.path_to("gopher"), "relay");
}

/// So many bytes go there and come back by TCP, begun by either side, and are the same.
pub fn same_bytes(web: &Ours, gopher: &Gopher, count: u32) {
    exchange(web, gopher, gopher.addresses[0], count);
    exchange(gopher, web, web.addresses[0], count);
}

pub fn exchange(from: &Namespace, to: &Namespace, address: IpAddr, count: u32) {
    const PORT: u16 = 8000;
    let bytes = noise(1, count as usize);
    to.echo(PORT).unwrap();
    let answer = from
        .send((address, PORT).into(), &bytes)
        .unwrap_or_else(|error| panic!("{count} bytes to {address}: {error}"));
    assert!(answer == bytes, "{address} returned other bytes");
}

/// A stream from here to there and back that lasts until it is dropped; it has begun to flow.
pub fn flow(from: &Namespace, to: &Namespace, address: IpAddr, port: u16) -> Flow {
    to.echo(port).unwrap();
    let flow = from.flow((address, port).into()).unwrap();
    flows(&flow, 10);
    flow
}

/// More bytes of the stream return within so many seconds.
pub fn flows(flow: &Flow, seconds: u64) {
    // More than what may be under way already.
    let enough = flow.returned() + 1_000_000;
    within(seconds, "bytes flow", || flow.returned() > enough);
}

/// No bytes of the stream return any more, within so many seconds.
pub fn stops(flow: &Flow, seconds: u64) {
    within(seconds, "no bytes flow", || {
        let before = flow.returned();
        thread::sleep(Duration::from_secs(1));
        flow.returned() == before
    });
}

pub fn within(seconds: u64, what: &str, is_so: impl FnMut() -> bool) {
    eventually(what, Duration::from_secs(seconds), is_so);
}
