//! What cases are made of: servers, machines, and what passes between them.

use std::{
    fmt,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, TcpStream, UdpSocket},
    ops::Deref,
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use tailnode_tests::{Authority, Derper, Headscale, Site, Tailnet, Testcontrol, eventually};

pub use tailnode_tests::{
    Container, Crowd, Delivery, Flow, Gopher, Host, Mischief, NameServer, Namespace, Proxy,
    Underlay, WallClock, Wire, noise,
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
    /// The relay of the second region, where there is one.
    pub relay: Option<Derper>,
    /// Who has certified the server, where it speaks HTTPS.
    authority: Option<Authority>,
    pub underlay: Underlay,
}

impl Scene {
    pub fn new(server: Server) -> Scene {
        Scene::start(server, Underlay::new(), Site::default(), None, None)
    }

    /// The server and its relay speak HTTPS, with certificates of a CA that only the machines of
    /// the scene know.
    pub fn secure(server: Server) -> Scene {
        let authority = Authority::new();
        let site = Site {
            https: Some(authority.issue(Underlay::ROUTER)),
            ..Site::default()
        };
        Scene::start(server, Underlay::new(), site, None, Some(authority))
    }

    /// Beside the server's own relay there is another, in a region of its own, [`SECOND`].
    pub fn two_regions(server: Server) -> Scene {
        Scene::with_second(server, None)
    }

    /// The same, and that relay has a certificate of a CA that nobody knows.
    pub fn two_regions_one_untrusted(server: Server) -> Scene {
        Scene::with_second(server, Some(&Authority::new()))
    }

    /// Nodes are let in by a person.
    pub fn by_login(server: Server) -> Scene {
        let site = Site {
            by_login: true,
            ..Site::default()
        };
        Scene::start(server, Underlay::new(), site, None, None)
    }

    fn with_second(server: Server, authority: Option<&Authority>) -> Scene {
        let underlay = Underlay::new();
        let relay = Derper::start(&underlay, Underlay::RELAY, authority);
        let site = Site {
            regions: vec![relay.region(2, SECOND)],
            ..Site::default()
        };
        Scene::start(server, underlay, site, Some(relay), None)
    }

    fn start(
        server: Server,
        underlay: Underlay,
        site: Site,
        relay: Option<Derper>,
        authority: Option<Authority>,
    ) -> Scene {
        let control = match server {
            C => Control::Ours(Tailnet::start_as(&underlay, PORT, DOMAIN, site)),
            H => Control::Headscale(Headscale::start(&underlay, DOMAIN, site)),
            T => {
                let authority = authority.as_ref();
                Control::Testcontrol(Testcontrol::start(&underlay, DOMAIN, site, authority))
            }
        };
        Scene {
            control,
            relay,
            authority,
            underlay,
        }
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

    /// Ends all auth keys.
    pub fn revoke_keys(&self) {
        match &self.control {
            Control::Ours(server) => server.revoke_keys(),
            Control::Headscale(server) => server.revoke_keys(),
            Control::Testcontrol(_) => panic!("testcontrol has one key for ever"),
        }
    }

    /// Lets a node in whose login page has this URL.
    pub fn approve(&self, page: &str) {
        match &self.control {
            Control::Ours(server) => server.approve(page),
            Control::Headscale(server) => server.approve(page),
            Control::Testcontrol(server) => server.approve(&self.underlay, page),
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

    /// The same in the server's own words.
    pub fn set_whole_policy(&self, policy: &serde_json::Value) {
        match &self.control {
            Control::Ours(server) => server.set_policy(&policy.to_string()),
            Control::Headscale(server) => server.set_policy(&policy.to_string()),
            Control::Testcontrol(_) => panic!("testcontrol has no policy"),
        }
    }

    /// Lets a node route these of the subnets that it offers, and no others.
    pub fn set_routes(&self, node: &str, routes: &[&str]) {
        match &self.control {
            Control::Ours(server) => server.set_routes(node, routes),
            Control::Headscale(server) => server.set_routes(node, routes),
            Control::Testcontrol(_) => {
                let routes = routes.join(",");
                self.administer(&format!("routes?node={node}&routes={routes}"), "");
            }
        }
    }

    /// Makes a node log in again.
    pub fn expire(&self, name: &str) {
        match &self.control {
            Control::Ours(server) => server.expire(name),
            Control::Headscale(server) => server.expire(name, None),
            Control::Testcontrol(_) => {
                self.administer(&format!("expire?node={name}"), "");
            }
        }
    }

    /// Forgets a node.
    pub fn delete(&self, name: &str) {
        match &self.control {
            Control::Ours(server) => server.delete(name),
            Control::Headscale(server) => server.delete(name),
            Control::Testcontrol(_) => panic!("testcontrol forgets no node"),
        }
    }

    /// Calls a node otherwise.
    pub fn rename(&self, name: &str, new: &str) {
        match &self.control {
            Control::Ours(server) => server.rename(name, new),
            Control::Headscale(server) => server.rename(name, new),
            Control::Testcontrol(_) => {
                self.administer(&format!("rename?node={name}&name={new}"), "");
            }
        }
    }

    /// Ends the server; its relay goes with it.
    pub fn stop_server(&mut self) {
        match &mut self.control {
            Control::Ours(server) => server.stop(),
            Control::Headscale(server) => server.stop(),
            Control::Testcontrol(_) => panic!("testcontrol would lose its state"),
        }
    }

    pub fn restart_server(&mut self) {
        match &mut self.control {
            Control::Ours(server) => server.restart(&self.underlay),
            Control::Headscale(server) => server.restart(&self.underlay),
            Control::Testcontrol(_) => panic!("testcontrol would lose its state"),
        }
    }

    /// Does what only testcontrol can: see integration/peers/testcontrol/admin.go.
    pub fn administer(&self, what: &str, body: &str) -> String {
        let Control::Testcontrol(server) = &self.control else {
            panic!("only testcontrol can {what}");
        };
        let answer = server.administer(&self.underlay, what, body);
        answer.unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    /// A machine on a link of its own, seen by all others.
    pub fn host(&self) -> Namespace {
        let mut host = self.underlay.host();
        if let Some(authority) = &self.authority {
            host.trust(authority);
        }
        host
    }

    /// A machine to which the relay at this address seems far away.
    pub fn host_far_from(&self, relay: Ipv4Addr) -> Namespace {
        let host = self.host();
        host.far_from(relay);
        host
    }

    /// Code of the server's own region.
    pub fn first(&self) -> &'static str {
        match self.control {
            Control::Ours(_) => "tailnode",
            Control::Headscale(_) => "headscale",
            Control::Testcontrol(_) => "test",
        }
    }

    /// Restarts the server's own relay, and with it the server, where they are one program.
    pub fn restart_relay(&mut self) {
        match &mut self.control {
            Control::Testcontrol(server) => {
                server.relay.kill();
                server.relay.restart(&self.underlay);
            }
            _ => {
                self.stop_server();
                self.restart_server();
            }
        }
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
        Ours::attach_with(host, container, json!({}))
    }

    /// The same on a network with options.
    pub fn attach_with(
        host: Host,
        container: Container,
        options: serde_json::Value,
    ) -> Result<Ours, String> {
        let answer = host.attach_to(&container, "tailnet", options)?;
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

    /// Its node, as `tailnode status` tells it; `null` where there is none.
    pub fn node(&self) -> Value {
        let status = self.host.status_of(&self.container).unwrap_or_default();
        status["node"].clone()
    }

    /// How it stands with the control server: `running` and so on.
    pub fn state(&self) -> String {
        let state = &self.node()["login"]["state"];
        state.as_str().unwrap_or_default().to_owned()
    }

    /// The addresses of its node now.
    pub fn addresses_now(&self) -> Vec<IpAddr> {
        serde_json::from_value(self.node()["addresses"].clone()).unwrap_or_default()
    }

    /// Waits until the peer knows the node by the addresses that it has now: its last map's may have
    /// been others, where the server forgot it meanwhile.
    pub fn settle(&mut self, peer: &Gopher, name: &str) {
        within(PATIENCE, "the peer knows the node's addresses", || {
            self.addresses = self.addresses_now();
            let seen = peer.peer(name).unwrap_or_default();
            self.state() == "running" && seen["TailscaleIPs"] == json!(self.addresses)
        });
    }

    /// The login page that it waits for somebody to open, once it gives this reason.
    pub fn page(&self, reason: &str) -> String {
        let mut login = Value::Null;
        // Headscale does not tell a node that it was deleted; the node hears so when it next tells
        // of its network, which an idle one does every two minutes.
        within(150, &format!("a login is needed because {reason}"), || {
            login = self.node()["login"].clone();
            login["state"] == "needs-login"
                && login["reason"]
                    .as_str()
                    .is_some_and(|it| it.contains(reason))
        });
        login["url"].as_str().unwrap().to_owned()
    }

    /// The container is stopped and started again.
    pub fn restarted(self) -> Result<Ours, String> {
        self.host.detach(&self.container)?;
        Ours::attach(self.host, self.container.started_again())
    }

    /// Code of the region where it is at home; empty: nowhere.
    pub fn home_relay(&self) -> String {
        let node = self.node();
        node["home_relay"].as_str().unwrap_or_default().to_owned()
    }

    /// How it sends to the peer of this name, in the words of its status; empty: it knows none.
    pub fn path_to(&self, peer: &str) -> String {
        let path = self.path(peer);
        path["via"].as_str().unwrap_or_default().to_owned()
    }

    /// Code of the region that it sends to the peer of this name by; empty: none.
    pub fn relay_to(&self, peer: &str) -> String {
        let path = self.path(peer);
        path["region"].as_str().unwrap_or_default().to_owned()
    }

    fn path(&self, peer: &str) -> Value {
        let full = format!("{peer}.{DOMAIN}");
        let node = self.node();
        let mut peers = node["peers"].as_array().into_iter().flatten();
        let found = peers.find(|status| status["name"] == *full);
        found.map_or(Value::Null, |peer| peer["path"].clone())
    }
}

/// What a namespace's programs can do, the container's can.
impl Deref for Ours {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.container
    }
}

/// Seconds that news may take on a busy machine, where no bound is promised.
pub const PATIENCE: u64 = 30;
/// Where all servers listen on the router.
pub const PORT: u16 = 8080;
pub const DOMAIN: &str = "demo.internal";
/// Code of the region of [`Scene::relay`].
pub const SECOND: &str = "second";
pub const MAGIC_DNS: &str = "100.100.100.100:53";

/// One ping passes, after some time for news of the peer to arrive.
pub fn reach(from: &Namespace, addresses: &[IpAddr]) {
    for &address in addresses {
        within(PATIENCE, &format!("{address} is reached"), || {
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
    gopher.pings_directly(web.addresses[0], 30).unwrap();
    within(PATIENCE, "our end's path is direct", || {
        passes(web, gopher.addresses[0]) && web.path_to("gopher") == "direct"
    });
}

/// Both ends say that packets travel by a relay.
pub fn relayed(web: &Ours, gopher: &Gopher) {
    reach(web, &gopher.addresses[..1]);
    reach(gopher, &web.addresses[..1]);
    let mut pong = Err("none yet".to_owned());
    within(PATIENCE, "a ping of theirs is answered", || {
        pong = gopher.ping_once(web.addresses[0]);
        pong.is_ok()
    });
    let pong = pong.unwrap();
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
    flows(&flow, PATIENCE);
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

/// A connection by TCP to an echo, which lasts.
pub struct Talk(TcpStream);

impl Talk {
    pub fn begin(from: &Namespace, to: &Namespace, address: IpAddr) -> Talk {
        const PORT: u16 = 8100;
        to.echo(PORT).unwrap();
        let patience = Duration::from_secs(PATIENCE);
        let connect = || TcpStream::connect_timeout(&(address, PORT).into(), patience);
        let stream = from.run(connect).unwrap();
        stream.set_read_timeout(Some(patience)).unwrap();
        stream.set_write_timeout(Some(patience)).unwrap();
        Talk(stream)
    }

    /// So many bytes go there and come back as they were.
    pub fn goes_on(&mut self, count: usize) {
        let bytes: Vec<u8> = (0..count).map(|number| (number % 251) as u8).collect();
        for part in bytes.chunks(16 << 10) {
            self.0.write_all(part).expect("the connection goes on");
            let mut answer = vec![0; part.len()];
            self.0.read_exact(&mut answer).expect("the echo goes on");
            assert!(answer == part, "other bytes came back");
        }
    }
}

pub fn within(seconds: u64, what: &str, is_so: impl FnMut() -> bool) {
    eventually(what, Duration::from_secs(seconds), is_so);
}
