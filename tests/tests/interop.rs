//! Our nodes and the programs of others: Tailscale's client, Headscale, Tailscale's test server.
//!
//! `make interop` runs this. It prints a line a case, writes target/interop.json, and fails when a
//! case does. Words after the program's name choose the cases whose names begin with them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a case reports by panicking, and not only in its own body"
)]

use std::{
    any::Any,
    env, fs,
    net::{IpAddr, TcpListener, TcpStream, UdpSocket},
    ops::Deref,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tailnode_tests::{
    Container, Gopher, Headscale, Host, Namespace, Tailnet, Testcontrol, Underlay, eventually,
};

/// A case with the servers that it is true under.
type Case = (&'static str, &'static [Server], fn(&Scene));

const CASES: &[Case] = &[
    ("join.reusable", ALL, join_reusable),
    ("join.once", WITH_KEYS, join_once),
    ("join.expired", WITH_KEYS, join_expired),
    ("join.ephemeral", WITH_KEYS, join_ephemeral),
    ("join.tagged", WITH_KEYS, join_tagged),
    ("join.login", WITH_KEYS, join_login),
    ("direct.lan", ALL, direct_lan),
    ("direct.ipv6", ALL, direct_ipv6),
    ("direct.nat-both", ALL, direct_nat_both),
    ("direct.nat-shared", ALL, direct_nat_shared),
    ("relay.udp-blocked", ALL, relay_udp_blocked),
    ("relay.path-lost", ALL, relay_path_lost),
    ("names.magicdns", ALL, names_magicdns),
    ("policy.default-deny", WITH_POLICY, policy_default_deny),
    ("policy.one-way", WITH_POLICY, policy_one_way),
    ("policy.port", WITH_POLICY, policy_port),
];

// ---- the cases ---------------------------------------------------------------------------------

fn join_reusable(scene: &Scene) {
    let key = scene.key(&["--reusable"]);
    let web = scene.ours("web", &key, scene.host());
    let db = scene.ours("db", &key, scene.host());
    let gopher = scene.gopher("gopher", &key, scene.host());
    for container in [&web, &db] {
        reach(container, &gopher.addresses);
        reach(&gopher, &container.addresses);
    }
    reach(&web, &db.addresses);
}

fn join_once(scene: &Scene) {
    let key = scene.key(&[]);
    let _gopher = scene.gopher("gopher", &key, scene.host());
    let error = Ours::join(scene.host(), &scene.url(), &key, "web").err();
    assert!(
        error.is_some_and(|error| error.contains("key")),
        "we joined by a key that was used"
    );
    let key = scene.key(&[]);
    let _web = scene.ours("web", &key, scene.host());
    let error = Gopher::join(scene.host(), &scene.url(), &key, "second").err();
    assert!(error.is_some(), "Go's client joined by a key that was used");
}

fn join_ephemeral(scene: &Scene) {
    let gopher = scene.gopher("gopher", &scene.key(&[]), scene.host());
    let web = scene.ours("web", &scene.key(&["--ephemeral"]), scene.host());
    let container = Container::new("brief");
    let key = web.host.auth_key("brief.key", &scene.key(&["--ephemeral"]));
    let options = json!({ "auth-key": key, "ephemeral": "true" });
    web.host.attach_to(&container, "fleeting", options).unwrap();
    within(5, "the node is there", || gopher.peer("brief").is_some());
    drop(container);
    within(5, "the node is gone", || gopher.peer("brief").is_none());
}

fn join_expired(scene: &Scene) {
    let key = scene.key_for_a_second();
    thread::sleep(Duration::from_millis(1500));
    let ours = Ours::join(scene.host(), &scene.url(), &key, "web").err();
    assert!(ours.is_some_and(|error| error.contains("key")));
    let theirs = Gopher::join(scene.host(), &scene.url(), &key, "gopher").err();
    assert!(theirs.is_some());
}

fn join_tagged(scene: &Scene) {
    let tag = scene.tag_flags("tag:web");
    let gopher = scene.gopher("gopher", &scene.key(&[]), scene.host());
    let web = scene.ours("web", &scene.key(&tag), scene.host());
    within(5, "the tag is seen", || {
        gopher
            .peer("web")
            .is_some_and(|peer| peer["Tags"] == json!(["tag:web"]))
    });
    reach(&gopher, &web.addresses);
}

fn join_login(scene: &Scene) {
    let open = |page: &str| scene.approve(page);
    let gopher = Gopher::log_in(scene.host(), &scene.url(), "gopher", open).unwrap();
    // Our container's start fails and tells the page; the next one succeeds.
    let host = Host::start_in(scene.host(), &scene.url(), None);
    let container = Container::new("web");
    let error = host.attach(&container).unwrap_err();
    let page = error
        .split_whitespace()
        .find(|word| word.contains("/register/"));
    let page = page.unwrap_or_else(|| panic!("no page in: {error}"));
    scene.approve(page.trim_matches(|c: char| !c.is_alphanumeric()));
    let web = Ours::attach(host, container).unwrap();
    reach(&gopher, &web.addresses);
}

fn direct_lan(scene: &Scene) {
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    direct(&web, &gopher);
    // With both beginnings, 100 MB each way.
    same_bytes(&web, &gopher, 50_000_000);
}

fn direct_ipv6(scene: &Scene) {
    let ours = scene.underlay.dual_host();
    let theirs = scene.underlay.dual_host();
    scene.underlay.block_udp();
    let (web, gopher) = scene.pair(ours, theirs);
    direct(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}

fn direct_nat_both(scene: &Scene) {
    let (ours, theirs) = (scene.underlay.nat(), scene.underlay.nat());
    let (web, gopher) = scene.pair(ours.host(), theirs.host());
    direct(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}

fn direct_nat_shared(scene: &Scene) {
    let nat = scene.underlay.nat();
    let (web, gopher) = scene.pair(nat.host(), nat.host());
    direct(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}

fn relay_udp_blocked(scene: &Scene) {
    scene.underlay.block_udp();
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    relayed(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}

fn relay_path_lost(scene: &Scene) {
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    direct(&web, &gopher);
    scene.underlay.block_udp();
    arrives(&web, &gopher, gopher.addresses[0], 5);
    // Theirs trusts a path for 6.5 s.
    arrives(&gopher, &web, web.addresses[0], 5);
    relayed(&web, &gopher);
    scene.underlay.unblock_udp();
    within(60, "the path is direct again", || {
        passes(&web, gopher.addresses[0]) && web.path_to("gopher") == "direct"
    });
    direct(&web, &gopher);
}

fn names_magicdns(scene: &Scene) {
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let resolver = MAGIC_DNS.parse().unwrap();
    within(5, "the short name is resolved", || {
        web.resolve(resolver, "gopher").as_ref() == Ok(&gopher.addresses)
    });
    // Go's client tells no IPv6 address of who has an IPv4 one.
    let sides: [(&Namespace, &str, &[IpAddr], &[IpAddr]); 2] = [
        (&web, "gopher", &gopher.addresses, &gopher.addresses),
        (&gopher, "web", &web.addresses, &web.addresses[..1]),
    ];
    for (asker, name, addresses, told) in sides {
        let name = format!("{name}.{DOMAIN}.");
        within(5, &format!("{name} is resolved"), || {
            asker.resolve(resolver, &name).as_deref() == Ok(told)
        });
        for &address in addresses {
            let names = asker.names_of(resolver, address);
            assert_eq!(names.unwrap_or_default(), [&*name], "of {address}");
        }
    }
}

fn policy_default_deny(scene: &Scene) {
    scene.set_policy(&[]);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let ways: [(&Namespace, IpAddr); 2] =
        [(&web, gopher.addresses[0]), (&gopher, web.addresses[0])];
    for (from, to) in ways {
        assert!(!passes(from, to), "{to} was reached");
    }
    // Nothing but the policy lies between them.
    scene.set_policy(&[("*".into(), "*:*".into())]);
    for (from, to) in ways {
        within(5, &format!("{to} is reached"), || passes(from, to));
    }
    scene.set_policy(&[]);
    for (from, to) in ways {
        within(5, &format!("{to} is shut"), || !passes(from, to));
    }
}

fn policy_one_way(scene: &Scene) {
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let ours: (&Namespace, IpAddr) = (&web, web.addresses[0]);
    let theirs: (&Namespace, IpAddr) = (&gopher, gopher.addresses[0]);
    for ((from, source), (to, destination)) in [(theirs, ours), (ours, theirs)] {
        scene.set_policy(&[(source.to_string(), format!("{destination}:*"))]);
        within(5, "the other way is shut", || !passes(to, source));
        within(5, "the allowed way is open", || passes(from, destination));
        exchange(from, to, destination, 1_000_000);
        assert!(!passes(to, source), "{destination} reached {source}");
    }
}

fn policy_port(scene: &Scene) {
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let sides: [(&Namespace, &Namespace, IpAddr); 2] = [
        (&gopher, &web, web.addresses[0]),
        (&web, &gopher, gopher.addresses[0]),
    ];
    for (from, to, address) in sides {
        let [one, other] = [8001, 8002];
        let listen = |port| to.run(|| TcpListener::bind(("::", port))).unwrap();
        let _listening = [listen(one), listen(other)];
        scene.set_policy(&[("*".to_owned(), format!("{address}:{one}"))]);
        within(5, "the other port is shut", || !opens(from, address, other));
        within(5, "the allowed port is open", || opens(from, address, one));
    }
}

// ---- their vocabulary --------------------------------------------------------------------------

const DOMAIN: &str = "demo.internal";
const MAGIC_DNS: &str = "100.100.100.100:53";

/// One ping passes, after some time for news of the peer to arrive.
fn reach(from: &Namespace, addresses: &[IpAddr]) {
    for &address in addresses {
        within(10, &format!("{address} is reached"), || {
            passes(from, address)
        });
    }
}

/// Whether one ping passes, now.
fn passes(from: &Namespace, to: IpAddr) -> bool {
    from.ping_within(to, Duration::from_secs(1)).is_ok()
}

/// A datagram arrives within so many seconds, of many that are sent.
fn arrives(from: &Namespace, to: &Namespace, address: IpAddr, seconds: u64) {
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
fn opens(from: &Namespace, to: IpAddr, port: u16) -> bool {
    let patience = Duration::from_secs(1);
    from.run(|| TcpStream::connect_timeout(&(to, port).into(), patience))
        .is_ok()
}

/// Both ends say that packets travel without a relay.
fn direct(web: &Ours, gopher: &Gopher) {
    reach(web, &gopher.addresses[..1]);
    gopher.pings_directly(web.addresses[0], 15).unwrap();
    within(15, "our end's path is direct", || {
        passes(web, gopher.addresses[0]) && web.path_to("gopher") == "direct"
    });
}

/// Both ends say that packets travel by a relay.
fn relayed(web: &Ours, gopher: &Gopher) {
    reach(web, &gopher.addresses[..1]);
    reach(gopher, &web.addresses[..1]);
    let pong = gopher.ping_once(web.addresses[0]).unwrap();
    assert!(pong.contains("via DERP"), "{pong}");
    assert_eq!(web.path_to("gopher"), "relay");
}

/// So many bytes go there and come back by TCP, begun by either side, and are the same.
fn same_bytes(web: &Ours, gopher: &Gopher, count: u32) {
    exchange(web, gopher, gopher.addresses[0], count);
    exchange(gopher, web, web.addresses[0], count);
}

fn exchange(from: &Namespace, to: &Namespace, address: IpAddr, count: u32) {
    const PORT: u16 = 8000;
    let bytes: Vec<u8> = (0..count).map(|number| (number % 251) as u8).collect();
    to.echo(PORT).unwrap();
    let answer = from
        .send((address, PORT).into(), &bytes)
        .unwrap_or_else(|error| panic!("{count} bytes to {address}: {error}"));
    assert!(answer == bytes, "{address} returned other bytes");
}

fn within(seconds: u64, what: &str, is_so: impl FnMut() -> bool) {
    eventually(what, Duration::from_secs(seconds), is_so);
}

// ---- their world -------------------------------------------------------------------------------

/// Who coordinates the tailnet of a case.
#[derive(Clone, Copy)]
enum Server {
    Ours,
    Headscale,
    Testcontrol,
}

use Server::{Headscale as H, Ours as C, Testcontrol as T};

const ALL: &[Server] = &[C, H, T];
/// Those with keys and logins of several kinds, and with a policy.
const WITH_KEYS: &[Server] = &[C, H];
const WITH_POLICY: &[Server] = &[C, H];

enum Control {
    Ours(Tailnet),
    Headscale(Headscale),
    Testcontrol(Testcontrol),
}

/// A server on the router of an underlay, and nobody there yet.
struct Scene {
    control: Control,
    underlay: Underlay,
}

impl Scene {
    fn new(server: Server) -> Scene {
        let underlay = Underlay::new();
        let control = match server {
            C => Control::Ours(Tailnet::start(&underlay, 8080, DOMAIN)),
            H => Control::Headscale(Headscale::start(&underlay, DOMAIN)),
            T => Control::Testcontrol(Testcontrol::start(&underlay, DOMAIN)),
        };
        Scene { control, underlay }
    }

    fn url(&self) -> String {
        match &self.control {
            Control::Ours(server) => server.url(),
            Control::Headscale(server) => server.url(),
            Control::Testcontrol(server) => server.url(),
        }
    }

    /// An auth key; the flags mean the same to both servers that have them.
    fn key(&self, flags: &[&str]) -> String {
        match &self.control {
            Control::Ours(server) => server.key(flags),
            Control::Headscale(server) => server.key(flags),
            Control::Testcontrol(_) => Testcontrol::KEY.to_owned(),
        }
    }

    fn key_for_a_second(&self) -> String {
        match self.control {
            Control::Ours(_) => self.key(&["--reusable", "--expires=1s"]),
            _ => self.key(&["--reusable", "--expiration=1s"]),
        }
    }

    fn tag_flags(&self, tag: &'static str) -> [&'static str; 2] {
        match self.control {
            Control::Ours(_) => ["--tag", tag],
            _ => ["--tags", tag],
        }
    }

    /// Lets a node in whose login page has this URL.
    fn approve(&self, page: &str) {
        match &self.control {
            Control::Ours(server) => server.approve(page),
            Control::Headscale(server) => server.approve(page),
            Control::Testcontrol(_) => panic!("testcontrol has no login page"),
        }
    }

    /// Lets every first reach every second (`ADDRESS:PORTS`), and nothing else.
    fn set_policy(&self, allowed: &[(String, String)]) {
        let rules = allowed
            .iter()
            .map(|(src, dst)| json!({ "action": "accept", "src": [src], "dst": [dst] }));
        let policy = json!({ "acls": rules.collect::<Vec<_>>() }).to_string();
        match &self.control {
            Control::Ours(server) => server.set_policy(&policy),
            Control::Headscale(server) => server.set_policy(&policy),
            Control::Testcontrol(_) => panic!("testcontrol has no policy"),
        }
    }

    /// A machine on a link of its own, seen by all others.
    fn host(&self) -> Namespace {
        self.underlay.host()
    }

    fn ours(&self, name: &str, key: &str, machine: Namespace) -> Ours {
        Ours::join(machine, &self.url(), key, name).unwrap()
    }

    fn gopher(&self, name: &str, key: &str, machine: Namespace) -> Gopher {
        Gopher::join(machine, &self.url(), key, name).unwrap()
    }

    /// Our `web` and their `gopher`, on these machines.
    fn pair(&self, ours: Namespace, theirs: Namespace) -> (Ours, Gopher) {
        let key = self.key(&["--reusable"]);
        (
            self.ours("web", &key, ours),
            self.gopher("gopher", &key, theirs),
        )
    }
}

/// A machine with one container, which has a node of ours.
struct Ours {
    container: Container,
    addresses: Vec<IpAddr>,
    host: Host,
}

impl Ours {
    fn join(machine: Namespace, url: &str, key: &str, name: &str) -> Result<Ours, String> {
        Ours::attach(
            Host::start_in(machine, url, Some(key)),
            Container::new(name),
        )
    }

    fn attach(host: Host, container: Container) -> Result<Ours, String> {
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
    fn path_to(&self, peer: &str) -> String {
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

// ---- running them ------------------------------------------------------------------------------

/// Cases that would begin later than this do not, and have failed.
const LIMIT: Duration = Duration::from_secs(15 * 60);

fn main() -> ExitCode {
    let chosen: Vec<String> = env::args().skip(1).collect();
    let began = Instant::now();
    let mut results = Vec::new();
    for &(name, servers, case) in CASES {
        for &server in servers {
            let name = match server {
                C => format!("{name}/tailnode-control"),
                H => format!("{name}/headscale"),
                T => format!("{name}/testcontrol"),
            };
            if !chosen.is_empty() && !chosen.iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            let started = Instant::now();
            let outcome = if began.elapsed() < LIMIT {
                eprintln!("=== {name}");
                // A thread's end is the end of all that it started.
                let run = thread::spawn(move || case(&Scene::new(server)));
                run.join().map_err(|panic| words(&*panic))
            } else {
                Err("not begun: the time was up".to_owned())
            };
            let ok = outcome.is_ok();
            let took = format!("{:.1} s", started.elapsed().as_secs_f32());
            let detail = outcome.err().unwrap_or(took);
            println!("{} {name}: {detail}", if ok { "ok    " } else { "FAILED" });
            results.push(json!({ "case": name, "ok": ok, "detail": detail }));
        }
    }
    let unknown = |prefix: &&String| {
        let mut results = results.iter();
        !results.any(|result| {
            result["case"]
                .as_str()
                .is_some_and(|name| name.starts_with(*prefix))
        })
    };
    if let Some(prefix) = chosen.iter().find(unknown) {
        println!("no case begins with {prefix}");
        return ExitCode::FAILURE;
    }
    let failed = results
        .iter()
        .filter(|result| result["ok"] == false)
        .count();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/interop.json");
    fs::write(file, format!("{:#}\n", Value::from(results.clone()))).unwrap();
    println!("{} cases, {failed} failed", results.len());
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it panicked without words").to_owned()
}
