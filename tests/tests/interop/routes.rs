use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::time::Duration;

use hickory_proto::rr::{RData, rdata::A};
use serde_json::{Value, json};
use tailnode_tests::Host;

use crate::scene::*;

pub const CASES: &[Case] = &[
    ("routes.accept", ALL, accept),
    ("routes.advertise", ALL, advertise),
    ("routes.name-server", ALL, name_server),
    ("routes.policy", WITH_POLICY, policy),
    ("routes.approved-by-policy", WITH_POLICY, approved_by_policy),
    ("routes.stand-by", ALL, stand_by),
    ("routes.stand-by-of-ours", ALL, stand_by_of_ours),
    ("routes.exit-used", ALL, exit_used),
    ("routes.exit-unknown", ALL, exit_unknown),
    ("routes.exit-offered", ALL, exit_offered),
];

/// A machine behind a router: it knows the router's two addresses, and no way beyond.
struct Lan {
    machine: Namespace,
    routes: [&'static str; 2],
    addresses: [IpAddr; 2],
}

impl Lan {
    fn behind(router: &Namespace) -> Lan {
        let lan = Lan {
            machine: Namespace::new(),
            routes: ["10.20.0.0/24", "fd20::/64"],
            addresses: ["10.20.0.2".parse().unwrap(), "fd20::2".parse().unwrap()],
        };
        let machine = &lan.machine;
        router.link("lan", "10.20.0.1/24", machine, "eth0", "10.20.0.2/24");
        router.ip("address add fd20::1/64 dev lan nodad");
        machine.ip("address add fd20::2/64 dev eth0 nodad");
        lan
    }

    /// The machine is reached, and takes what comes for the router's own.
    fn is_reached(&self, from: &Namespace) {
        reach(from, &self.addresses);
        for (address, router) in self.addresses.into_iter().zip(["10.20.0.1", "fd20::1"]) {
            let router: IpAddr = router.parse().unwrap();
            assert_eq!(self.sees(from, address), router, "at {address}");
        }
        exchange(from, &self.machine, self.addresses[0], 1_000_000);
    }

    /// The address that a connection to this one comes from.
    fn sees(&self, from: &Namespace, address: IpAddr) -> IpAddr {
        source(&self.machine, from, address)
    }

    fn is_not_reached(&self, from: &Namespace) {
        for address in self.addresses {
            within(PATIENCE, "the subnet is out of reach", || {
                !passes(from, address)
            });
        }
    }
}

/// The Internet, as far as there is any: an address of each family that no tailnet has. It answers
/// whoever comes by the link from a router, under the router's addresses.
const INTERNET: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1)),
];

/// By a link of the machine's own, which is its way to these destinations.
fn internet_behind(router: &Namespace, destinations: [String; 2]) -> Namespace {
    let internet = Namespace::new();
    router.link("wan", "10.40.0.2/24", &internet, "eth0", "10.40.0.1/24");
    router.ip("address add fd40::2/64 dev wan nodad");
    internet.ip("address add fd40::1/64 dev eth0 nodad");
    for (destination, gateway) in destinations.into_iter().zip(["10.40.0.1", "fd40::1"]) {
        router.ip(&format!("route add {destination} via {gateway}"));
    }
    for address in INTERNET {
        internet.ip(&format!("address add {address} dev lo nodad"));
    }
    internet
}

/// A container's only other network, with the Internet behind it.
fn internet_beside(container: &Namespace) -> Namespace {
    internet_behind(container, ["default"; 2].map(String::from))
}

/// The address that a connection comes from, as who takes it sees it.
fn source(taker: &Namespace, from: &Namespace, address: IpAddr) -> IpAddr {
    let listener = taker.run(|| TcpListener::bind((address, 0))).unwrap();
    let to = listener.local_addr().unwrap();
    let patience = Duration::from_secs(PATIENCE);
    let stream = from.run(|| TcpStream::connect_timeout(&to, patience));
    let _stream = stream.unwrap_or_else(|error| panic!("to {to}: {error}"));
    listener.accept().unwrap().1.ip()
}

fn forward(machine: &Namespace) {
    machine.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
}

/// Their machine, with a subnet behind it that it offers.
fn their_router(scene: &Scene, key: &str, name: &str) -> (Gopher, Lan) {
    let machine = scene.host();
    forward(&machine);
    let lan = Lan::behind(&machine);
    let gopher = scene.gopher(name, key, machine);
    gopher.set(&[&format!("--advertise-routes={}", lan.routes.join(","))]);
    (gopher, lan)
}

/// Our container with these options, and what `prepare` puts into it before its node comes.
fn ours<T>(
    scene: &Scene,
    key: &str,
    name: &str,
    options: Value,
    prepare: impl FnOnce(&Namespace) -> T,
) -> (Ours, T) {
    let host = Host::start_in(scene.host(), &scene.url(), Some(key));
    let container = Container::new(name);
    let prepared = prepare(&container);
    let ours = Ours::attach_with(host, container, options).unwrap();
    (ours, prepared)
}

/// Our container, with a subnet behind it that it offers.
fn our_router(scene: &Scene, key: &str, name: &str) -> (Ours, Lan) {
    let options = json!({ "advertise-routes": "10.20.0.0/24+fd20::/64" });
    ours(scene, key, name, options, Lan::behind)
}

fn our_client(scene: &Scene, key: &str, name: &str) -> Ours {
    ours(scene, key, name, json!({ "accept-routes": "true" }), |_| ()).0
}

fn their_client(scene: &Scene, key: &str, name: &str) -> Gopher {
    let gopher = scene.gopher(name, key, scene.host());
    gopher.set(&["--accept-routes"]);
    gopher
}

fn accept(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key(&["--reusable"]);
    let (_router, lan) = their_router(&scene, &key, "router");
    let web = our_client(&scene, &key, "web");
    let plain = scene.ours("plain", &key, scene.host());
    lan.is_not_reached(&web);
    scene.set_routes("router", &lan.routes);
    lan.is_reached(&web);
    lan.is_not_reached(&plain);
    // Not even where the container itself leads the packets to its node.
    for route in lan.routes {
        plain.ip(&format!("route add {route} dev tailscale0"));
    }
    lan.is_not_reached(&plain);

    scene.set_routes("router", &[]);
    lan.is_not_reached(&web);
    within(PATIENCE, "the routes are gone", || {
        !web.ip("route show").contains("10.20.0.0/24")
    });
    scene.set_routes("router", &lan.routes);
    lan.is_reached(&web);
}

fn advertise(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key(&["--reusable"]);
    let (router, lan) = our_router(&scene, &key, "router");
    let gopher = their_client(&scene, &key, "gopher");
    let web = our_client(&scene, &key, "web");
    for client in [&gopher as &Namespace, &web] {
        lan.is_not_reached(client);
    }
    scene.set_routes("router", &lan.routes);
    for client in [&gopher as &Namespace, &web] {
        lan.is_reached(client);
    }
    // On the same host, too, where nodes need no tunnel.
    let near = Container::new("near");
    let options = json!({ "accept-routes": "true" });
    router.host.attach_to(&near, "tailnet", options).unwrap();
    lan.is_reached(&near);
    // Headscale does not tell a router what was approved until it connects again.
    if !matches!(server, H) {
        within(PATIENCE, "the router knows that it is one", || {
            let status = router.host.status_of(&router.container).unwrap();
            status["node"]["routes"]["routed"] == json!(lan.routes)
        });
    }

    // The container goes on without the tailnet, and as it was before.
    router.host.detach(&router.container).unwrap();
    let switches = "sysctl -n net.ipv4.ip_forward net.ipv6.conf.all.forwarding";
    assert_eq!(router.sh(switches), "0\n0\n");
}

/// The server that the tailnet names for a zone is in a subnet, and nowhere else.
fn name_server(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key(&["--reusable"]);
    let (router, lan) = their_router(&scene, &key, "router");
    let office = NameServer::OFFICE;
    let name = format!("intranet.{}.", NameServer::OFFICE_ZONE);
    let IpAddr::V4(somewhere) = INTERNET[0] else {
        unreachable!("the first is IPv4");
    };
    let known = [(&*name, RData::A(A(somewhere)))];
    let _office = NameServer::start_in(&lan.machine, office, &known);
    router.ip(&format!("route add {office} via {}", lan.addresses[0]));
    let route = format!("{office}/32");
    router.set(&[&format!("--advertise-routes={route}")]);
    scene.set_routes("router", &[&route]);
    let web = our_client(&scene, &key, "web");
    let gopher = their_client(&scene, &key, "gopher");
    for asker in [&web as &Namespace, &gopher] {
        reach(asker, &[office.into()]);
        within(PATIENCE, "the name is resolved", || {
            asker.resolve(MAGIC_DNS.parse().unwrap(), &name) == Ok(vec![INTERNET[0]])
        });
    }
}

fn policy(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key(&["--reusable"]);
    let (_ours, our_lan) = our_router(&scene, &key, "ours");
    let gopher = their_client(&scene, &key, "gopher");
    scene.set_routes("ours", &our_lan.routes);
    our_lan.is_reached(&gopher);
    let address = our_lan.addresses[0];
    let listen = |port| {
        let bind = || TcpListener::bind((address, port));
        our_lan.machine.run(bind).unwrap()
    };
    let _listening = [listen(8001), listen(8002)];
    let who = gopher.addresses[0].to_string();
    scene.set_policy(&[(who.clone(), format!("{address}:8001"))]);
    within(PATIENCE, "the other port is shut", || {
        !opens(&gopher, address, 8002)
    });
    within(PATIENCE, "the allowed port is open", || {
        opens(&gopher, address, 8001)
    });
    scene.set_policy(&[(who, "10.30.0.0/24:*".into())]);
    within(PATIENCE, "all is shut", || !opens(&gopher, address, 8001));
}

fn approved_by_policy(server: Server) {
    let scene = Scene::new(server);
    scene.set_whole_policy(&json!({
        "tagOwners": { "tag:router": ["user@"] },
        "acls": [{ "action": "accept", "src": ["*"], "dst": ["*:*"] }],
        "autoApprovers": { "routes": {
            "10.20.0.0/16": ["tag:router"], "fd20::/48": ["tag:router"],
        } },
    }));
    let tagged = scene.key(&scene.tag_flags("tag:router"));
    let key = scene.key(&["--reusable"]);
    let (_router, lan) = our_router(&scene, &tagged, "router");
    let gopher = their_client(&scene, &key, "gopher");
    lan.is_reached(&gopher);
}

fn stand_by(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key(&["--reusable"]);
    let (first, first_lan) = their_router(&scene, &key, "first");
    let (second, second_lan) = their_router(&scene, &key, "second");
    let web = our_client(&scene, &key, "web");
    scene.set_routes("first", &first_lan.routes);
    first_lan.is_reached(&web);
    relieve(&scene, &second_lan, &web, first);
    drop(second);
}

fn stand_by_of_ours(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key(&["--reusable"]);
    let (first, first_lan) = our_router(&scene, &key, "first");
    let (second, second_lan) = our_router(&scene, &key, "second");
    let gopher = their_client(&scene, &key, "gopher");
    scene.set_routes("first", &first_lan.routes);
    first_lan.is_reached(&gopher);
    relieve(&scene, &second_lan, &gopher, first);
    drop(second);
}

/// The second router takes over from the first, which ends.
fn relieve<T>(scene: &Scene, second: &Lan, client: &Namespace, first: T) {
    if let Control::Testcontrol(_) = scene.control {
        // It has no turns: both would be routers at once.
        scene.set_routes("first", &[]);
    }
    scene.set_routes("second", &second.routes);
    drop(first);
    let address = second.addresses[0];
    let listener = || TcpListener::bind((address, 8003));
    let _listener = second.machine.run(listener).unwrap();
    within(PATIENCE, "the second router has the turn", || {
        opens(client, address, 8003)
    });
    second.is_reached(client);
}

fn exit_used(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key(&["--reusable"]);
    let machine = scene.host();
    forward(&machine);
    let internet = internet_behind(&machine, INTERNET.map(|address| address.to_string()));
    let gopher = scene.gopher("gopher", &key, machine);
    gopher.set(&["--advertise-exit-node"]);
    // The container's own network would lead to another Internet, and must not.
    let options = json!({ "exit-node": "gopher" });
    let (web, leak) = ours(&scene, &key, "web", options, internet_beside);
    let options = json!({
        "exit-node": gopher.addresses[0], "exit-node-allow-lan-access": "true",
    });
    let (beside, _leak) = ours(&scene, &key, "beside", options, internet_beside);
    let beside_lan: [IpAddr; 2] = ["10.40.0.1".parse().unwrap(), "fd40::1".parse().unwrap()];
    // Nothing leaves until the exit is approved, and then everything by it.
    for address in INTERNET.into_iter().chain(beside_lan) {
        assert!(
            !passes(&web, address),
            "{address} was reached beside the exit"
        );
    }
    scene.set_routes("gopher", &["0.0.0.0/0", "::/0"]);
    reach(&web, &INTERNET);
    for (address, own) in INTERNET.into_iter().zip(["10.40.0.2", "fd40::2"]) {
        let own: IpAddr = own.parse().unwrap();
        assert_eq!(source(&internet, &web, address), own);
    }
    exchange(&web, &internet, INTERNET[0], 1_000_000);
    reach(&web, &gopher.addresses);
    reach(&gopher, &web.addresses);
    let exit = &web.host.status_of(&web.container).unwrap()["node"]["routes"];
    assert_eq!(
        (&exit["exit_node"], &exit["exits"]),
        (&json!("gopher"), &json!(true))
    );

    // The container's own networks are reached where that was asked for.
    reach(&beside, &beside_lan);
    for address in beside_lan {
        assert!(
            !passes(&web, address),
            "{address} was reached beside the exit"
        );
    }
    drop(gopher);
    for address in INTERNET {
        within(PATIENCE, "the exit is gone", || !passes(&web, address));
    }
    // And with the daemon gone, too.
    let Ours {
        mut host,
        container,
        ..
    } = web;
    host.kill();
    within(PATIENCE, "the device is gone", || {
        container.links() == ["wan"]
    });
    for address in INTERNET {
        assert!(
            !passes(&container, address),
            "{address} was reached without an exit"
        );
    }
    drop(leak);
}

fn exit_unknown(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key(&["--reusable"]);
    let gopher = scene.gopher("gopher", &key, scene.host());
    let options = json!({ "exit-node": "nobody" });
    let (web, _leak) = ours(&scene, &key, "web", options, internet_beside);
    reach(&web, &gopher.addresses);
    assert!(!passes(&web, INTERNET[0]), "there was a way past the exit");
    let status = web.host.status_of(&web.container).unwrap();
    let health = status["node"]["health"].to_string();
    assert!(
        health.contains("the exit node nobody is not in the tailnet"),
        "{health}"
    );

    // Without the tailnet, the container has its own way again.
    web.host.detach(&web.container).unwrap();
    assert!(passes(&web, INTERNET[0]));
}

fn exit_offered(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key(&["--reusable"]);
    let options = json!({ "advertise-exit-node": "true" });
    let (router, (internet, lan)) = ours(&scene, &key, "router", options, |container| {
        (internet_beside(container), Lan::behind(container))
    });
    let gopher = scene.gopher("gopher", &key, scene.host());
    scene.set_routes("router", &["0.0.0.0/0", "::/0"]);
    within(PATIENCE, "the exit is offered", || {
        gopher
            .peer("router")
            .is_some_and(|peer| peer["ExitNodeOption"] == true)
    });
    gopher.set(&[&format!("--exit-node={}", router.addresses[0])]);
    let options = json!({ "exit-node": "router" });
    let (web, ()) = ours(&scene, &key, "web", options, |_| ());
    for client in [&gopher as &Namespace, &web] {
        reach(client, &INTERNET);
        for (address, own) in INTERNET.into_iter().zip(["10.40.0.2", "fd40::2"]) {
            let own: IpAddr = own.parse().unwrap();
            assert_eq!(source(&internet, client, address), own);
        }
        exchange(client, &internet, INTERNET[0], 1_000_000);
        // An exit leads to the Internet, and not to the networks that its container is on.
        lan.is_not_reached(client);
    }
}
