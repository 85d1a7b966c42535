//! The whole system, from the plugin's request to packets between containers, without an engine.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test reports by panicking, and not only in its own body"
)]

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use hickory_proto::op::ResponseCode;
use serde_json::{Value, json};
use tailnode_tests::{Container, Host, Tailnet, Underlay, eventually};

const DOMAIN: &str = "demo.internal";
const PORT: u16 = 8080;
/// How long a container's start may take, whatever is broken.
const START: Duration = Duration::from_secs(10);

const MAGIC_DNS: &str = "100.100.100.100:53";

/// A tailnet, and some hosts that join it by one reusable key.
struct Scene {
    hosts: Vec<Host>,
    tailnet: Tailnet,
    underlay: Underlay,
}

impl Scene {
    fn new(hosts: usize) -> Scene {
        Scene::with_key(hosts, &["--reusable"])
    }

    fn with_key(hosts: usize, flags: &[&str]) -> Scene {
        let underlay = Underlay::new();
        let tailnet = Tailnet::start(&underlay, PORT, DOMAIN);
        let key = tailnet.key(flags);
        let hosts = (0..hosts)
            .map(|_| Host::start(&underlay, &tailnet, &key))
            .collect();
        Scene {
            hosts,
            tailnet,
            underlay,
        }
    }
}

/// A container that runs, and its node's addresses.
struct Attached {
    container: Container,
    addresses: Vec<IpAddr>,
}

impl Attached {
    fn new(host: &Host, name: &str) -> Attached {
        let container = Container::new(name);
        let answer = host.attach(&container).unwrap();
        Attached {
            container,
            addresses: addresses(&answer, "tailscale0"),
        }
    }
}

/// The addresses in the plugin's answer.
fn addresses(answer: &Value, device: &str) -> Vec<IpAddr> {
    let subnets = answer["interfaces"][device]["subnets"].as_array().unwrap();
    subnets
        .iter()
        .map(|subnet| {
            let net: ipnet::IpNet = subnet["ipnet"].as_str().unwrap().parse().unwrap();
            net.addr()
        })
        .collect()
}

fn magic_dns() -> SocketAddr {
    MAGIC_DNS.parse().unwrap()
}

/// How `from` sends to the peer of this name, in the words of its status.
fn path(host: &Host, from: &Container, peer: &str) -> String {
    let status = host.status_of(from).unwrap_or_default();
    let peers = status["node"]["peers"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let full = format!("{peer}.{DOMAIN}");
    let found = peers.iter().find(|status| status["name"] == *full);
    found.map_or_else(String::new, |peer| {
        peer["path"]["via"].as_str().unwrap().to_owned()
    })
}

fn online(tailnet: &Tailnet, name: &str) -> bool {
    tailnet
        .node(name)
        .is_some_and(|node| node["online"] == true)
}

/// Pings until an answer comes: a peer may have been told of the newcomer a moment later.
fn reaches(from: &Container, to: IpAddr) {
    eventually(&format!("{} reaches {to}", from.name), START, || {
        from.ping(to).is_ok()
    });
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn containers_on_two_hosts_reach_each_other_by_address_and_by_name() {
    let scene = Scene::new(2);
    let web = Attached::new(&scene.hosts[0], "web");
    let client = Attached::new(&scene.hosts[1], "client");
    assert_eq!(web.addresses.len(), 2, "one IPv4 and one IPv6 address");
    for &address in &web.addresses {
        reaches(&client.container, address);
    }
    for &address in &client.addresses {
        reaches(&web.container, address);
    }
    for name in ["web", "web.demo.internal", "web.demo.internal."] {
        assert_eq!(
            client.container.resolve(magic_dns(), name).unwrap(),
            web.addresses,
            "{name}"
        );
    }
    assert_eq!(
        client.container.resolve(magic_dns(), "client").unwrap(),
        client.addresses
    );
    assert_eq!(
        client
            .container
            .resolve(magic_dns(), "nobody.demo.internal")
            .unwrap_err(),
        ResponseCode::NXDomain
    );
    // More than fits in any buffer on the way, in packets as large as they may be.
    let bytes: Vec<u8> = (0..4_000_000_u32)
        .map(|number| (number % 251) as u8)
        .collect();
    for (number, &address) in web.addresses.iter().enumerate() {
        let port = 8000 + number as u16;
        web.container.echo(port).unwrap();
        assert!(
            client
                .container
                .send((address, port).into(), &bytes)
                .unwrap()
                == bytes
        );
    }
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn containers_on_one_host_reach_each_other() {
    let scene = Scene::new(1);
    let web = Attached::new(&scene.hosts[0], "web");
    let client = Attached::new(&scene.hosts[0], "client");
    for &address in &web.addresses {
        reaches(&client.container, address);
    }
    assert_eq!(
        client.container.resolve(magic_dns(), "web").unwrap(),
        web.addresses
    );
    // No tunnel lies between them, and policy does.
    assert_eq!(path(&scene.hosts[0], &client.container, "web"), "local");
    for &address in &web.addresses {
        same_bytes(&client.container, &web.container, address);
    }
    let [v4, ..] = web.addresses[..] else {
        panic!("no address");
    };
    scene.tailnet.set_policy(r#"{ "acls": [] }"#);
    eventually("policy shuts the way", START, || {
        client
            .container
            .ping_within(v4, Duration::from_secs(1))
            .is_err()
    });
    scene.tailnet.set_policy(
        r#"{ "acls": [{ "action": "accept", "src": ["*"], "dst": ["web:8000"] }],
             "hosts": { "web": "WEB" } }"#
            .replace("WEB", &v4.to_string())
            .as_str(),
    );
    web.container.echo(8000).unwrap();
    eventually("policy opens a port", START, || {
        client
            .container
            .send((v4, 8000).into(), b"hello")
            .is_ok_and(|answer| answer == b"hello")
    });
    assert!(
        client.container.ping(v4).is_ok(),
        "who may reach a port may ping"
    );
    assert!(
        web.container
            .send((client.addresses[0], 8000).into(), b"")
            .is_err()
    );
}

/// 20 MB go there and come back by TCP, and are the same.
fn same_bytes(from: &Container, to: &Container, address: IpAddr) {
    const PORT: u16 = 7000;
    let bytes: Vec<u8> = (0..20_000_000u32)
        .map(|number| (number % 251) as u8)
        .collect();
    to.echo(PORT).unwrap();
    assert!(from.send((address, PORT).into(), &bytes).unwrap() == bytes);
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_subnet_is_reached_through_a_container_on_any_host() {
    let scene = Scene::new(2);
    scene.tailnet.set_policy(
        r#"{ "acls": [{ "action": "accept", "src": ["*"], "dst": ["*:*"] }],
             "autoApprovers": { "routes": { "10.77.0.0/24": ["user@demo.internal"] } } }"#,
    );
    let [gateway, lan, beside, far] = ["gateway", "lan", "beside", "far"].map(Container::new);
    let link = ("10.77.0.1/24", "10.77.0.2/24");
    gateway
        .namespace
        .link("lan0", link.0, &lan.namespace, "eth0", link.1);
    let attach = |host: &Host, container, options| host.attach_to(container, "tailnet", options);
    let offers = json!({ "advertise-routes": "10.77.0.0/24" });
    attach(&scene.hosts[0], &gateway, offers).unwrap();
    // A neighbour of the router has no tunnel to it, another host has.
    let server = "10.77.0.2".parse().unwrap();
    for (host, container, via) in [(0, &beside, "local"), (1, &far, "direct")] {
        let host = &scene.hosts[host];
        attach(host, container, json!({ "accept-routes": "true" })).unwrap();
        reaches(container, server);
        same_bytes(container, &lan, server);
        eventually("the way is the best", START, || {
            path(host, container, "gateway") == via
        });
    }
}

/// Whatever the kernel may hand over joined, the same bytes arrive.
fn without_offload(offload: &'static str) {
    let underlay = Underlay::new();
    let tailnet = Tailnet::start(&underlay, PORT, DOMAIN);
    let key = tailnet.key(&["--reusable"]);
    // One that may not, and one that may: each has to do with what the other sends.
    let hosts = [&[offload][..], &[]]
        .map(|arguments| Host::start_with(&underlay, &tailnet, &key, arguments));
    let web = Attached::new(&hosts[0], "web");
    let beside = Attached::new(&hosts[0], "beside");
    let far = Attached::new(&hosts[1], "far");
    for (from, to) in [(&far, &web), (&web, &far), (&beside, &web)] {
        for &address in &to.addresses {
            reaches(&from.container, address);
            same_bytes(&from.container, &to.container, address);
        }
    }
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn bytes_arrive_where_only_tcp_is_offloaded() {
    without_offload("--offload=tcp");
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn bytes_arrive_without_offloads() {
    without_offload("--offload=none");
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn the_device_is_ready_when_the_plugin_has_answered() {
    let scene = Scene::new(1);
    let web = Attached::new(&scene.hosts[0], "web");
    let container = &web.container;
    let link = &container.namespace.ip_json("address show tailscale0")[0];
    assert_eq!(link["mtu"], 1280);
    let [v4, v6] = web.addresses[..] else {
        panic!("{:?}", web.addresses)
    };
    let text = link.to_string();
    assert!(
        text.contains(&v4.to_string()) && text.contains(&v6.to_string()),
        "{text}"
    );
    // The first query ever, at once.
    assert_eq!(
        container.resolve(magic_dns(), "web").unwrap(),
        web.addresses
    );
    let status = scene.hosts[0].status_of(container).unwrap();
    assert_eq!(status["container"], "web");
    assert_eq!(status["engine"], "podman");
    assert_eq!(status["network"], "tailnet");
    assert_eq!(status["interface"], "tailscale0");
    assert_eq!(status["node"]["name"], "web.demo.internal");
    assert_eq!(status["node"]["login"]["state"], "running");
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn packets_go_direct_and_through_the_relay_where_they_must() {
    let scene = Scene::new(2);
    let web = Attached::new(&scene.hosts[0], "web");
    let client = Attached::new(&scene.hosts[1], "client");
    let becomes = |wanted: &str, within| {
        eventually(
            &format!("the path is {wanted}"),
            Duration::from_secs(within),
            || {
                let _lost_while_the_path_changes = client.container.ping(web.addresses[0]);
                path(&scene.hosts[1], &client.container, "web") == wanted
            },
        );
    };
    becomes("direct", 15);
    scene.underlay.block_udp();
    becomes("relay", 30);
    reaches(&client.container, web.addresses[0]);
    scene.underlay.unblock_udp();
    becomes("direct", 75);
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn containers_reach_each_other_where_no_udp_passes_at_all() {
    let scene = Scene::new(2);
    scene.underlay.block_udp();
    let web = Attached::new(&scene.hosts[0], "web");
    let client = Attached::new(&scene.hosts[1], "client");
    reaches(&client.container, web.addresses[0]);
    assert_eq!(path(&scene.hosts[1], &client.container, "web"), "relay");
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn nothing_is_left_when_a_container_has_stopped() {
    let mut scene = Scene::new(1);
    let host = &scene.hosts[0];
    let before = host.open_files();
    let web = Attached::new(host, "web");
    assert!(online(&scene.tailnet, "web"));
    host.detach(&web.container).unwrap();
    assert!(web.container.namespace.links().is_empty());
    assert_eq!(host.namespace.links(), ["eth0"]);
    assert_eq!(host.status(), Vec::<Value>::new());
    eventually("the node is offline", START, || {
        !online(&scene.tailnet, "web")
    });
    eventually("the daemon closes its files", START, || {
        host.open_files() <= before
    });
    // Podman asks again when it removes the container.
    host.detach(&web.container).unwrap();
    scene.hosts[0].stop();
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn nothing_is_left_when_a_container_just_vanishes() {
    let scene = Scene::new(1);
    let host = &scene.hosts[0];
    let web = Attached::new(host, "web");
    let Container { namespace, .. } = web.container;
    drop(namespace);
    eventually("the daemon forgets it", START, || host.status().is_empty());
    eventually("the node is offline", START, || {
        !online(&scene.tailnet, "web")
    });
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_container_that_starts_again_has_its_address_again() {
    let mut scene = Scene::new(1);
    let web = Attached::new(&scene.hosts[0], "web");
    let other = Attached::new(&scene.hosts[0], "other");
    assert_ne!(web.addresses, other.addresses);
    scene.hosts[0].detach(&web.container).unwrap();
    let again = web.container.started_again();
    assert_eq!(
        addresses(&scene.hosts[0].attach(&again).unwrap(), "tailscale0"),
        web.addresses
    );
    // Another container of the name, once the first is gone.
    scene.hosts[0].detach(&again).unwrap();
    let successor = Attached::new(&scene.hosts[0], "web");
    assert_eq!(successor.addresses, web.addresses);
    // After a crash and a reboot there was no teardown.
    scene.hosts[0].kill();
    scene.hosts[0].restart();
    let again = successor.container.started_again();
    assert_eq!(
        addresses(&scene.hosts[0].attach(&again).unwrap(), "tailscale0"),
        web.addresses
    );
    assert_eq!(scene.tailnet.nodes().len(), 2);
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn an_ephemeral_node_is_gone_at_once() {
    let scene = Scene::with_key(1, &["--reusable", "--ephemeral"]);
    let web = Attached::new(&scene.hosts[0], "web");
    assert!(scene.tailnet.node("web").is_some());
    scene.hosts[0].detach(&web.container).unwrap();
    eventually("the node is gone", START, || {
        scene.tailnet.node("web").is_none()
    });

    // It can be asked for by the network as well, and no teardown may come.
    let scene = Scene::new(1);
    let container = Container::new("web");
    scene.hosts[0]
        .attach_to(&container, "tailnet", json!({ "ephemeral": "true" }))
        .unwrap();
    assert!(scene.tailnet.node("web").is_some());
    drop(container);
    eventually("the node is gone", START, || {
        scene.tailnet.node("web").is_none()
    });
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_second_container_of_the_same_name_is_a_node_of_its_own() {
    let scene = Scene::new(1);
    let first = Attached::new(&scene.hosts[0], "web");
    let second = Attached::new(&scene.hosts[0], "web");
    assert_ne!(first.addresses, second.addresses);
    reaches(&second.container, first.addresses[0]);
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn ten_containers_start_at_once() {
    let scene = Scene::new(1);
    let host = &scene.hosts[0];
    let names: Vec<_> = (0..10).map(|number| format!("web{number}")).collect();
    let attached: Vec<_> = thread::scope(|scope| {
        let starts: Vec<_> = names
            .iter()
            .map(|name| scope.spawn(|| Attached::new(host, name)))
            .collect();
        starts
            .into_iter()
            .map(|start| start.join().unwrap())
            .collect()
    });
    assert_eq!(host.status().len(), 10);
    for (from, to) in attached.iter().zip(attached.iter().cycle().skip(1)) {
        reaches(&from.container, to.addresses[0]);
    }
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn one_container_is_on_two_tailnets() {
    let scene = Scene::new(1);
    let host = &scene.hosts[0];
    let other = Tailnet::start(&scene.underlay, 8090, "other.internal");
    let key = host.auth_key("other.key", &other.key(&["--reusable"]));
    let options = json!({ "login-server": other.url(), "auth-key": key });

    // Both servers give the same addresses in the same order: have some taken in the second, so
    // that the containers' differ.
    let attach_there = |name: &str| {
        let container = Container::new(name);
        let answer = host
            .attach_to(&container, "othernet", options.clone())
            .unwrap();
        Attached {
            container,
            addresses: addresses(&answer, "tailscale0"),
        }
    };
    let _taken = ["one", "two", "three"].map(attach_there);
    let there = attach_there("there");
    let here = Attached::new(host, "here");

    let both = Attached::new(host, "both");
    let answer = host
        .attach_to(&both.container, "othernet", options.clone())
        .unwrap();
    let addresses_there = addresses(&answer, "tailscale1");
    assert_eq!(
        both.container.namespace.links(),
        ["tailscale0", "tailscale1"]
    );
    for (&there, &here) in there.addresses.iter().zip(&here.addresses) {
        reaches(&both.container, here);
        reaches(&both.container, there);
    }
    reaches(&here.container, both.addresses[0]);
    reaches(&there.container, addresses_there[0]);

    let dns = magic_dns();
    for (name, addresses) in [
        ("here.demo.internal", &here.addresses),
        ("there.other.internal", &there.addresses),
        ("here", &here.addresses),
        ("there", &there.addresses),
    ] {
        assert_eq!(
            both.container.resolve(dns, name).as_ref(),
            Ok(addresses),
            "{name}"
        );
    }
    // Who is on one tailnet hears nothing of the other.
    assert!(here.container.resolve(dns, "there.other.internal").is_err());

    // The first tailnet goes, and the second serves on.
    host.detach(&both.container).unwrap();
    assert_eq!(both.container.namespace.links(), ["tailscale1"]);
    reaches(&both.container, there.addresses[0]);
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_node_serves_on_while_the_coordination_server_is_away() {
    let mut scene = Scene::new(1);
    let web = Attached::new(&scene.hosts[0], "web");
    let client = Attached::new(&scene.hosts[0], "client");
    reaches(&client.container, web.addresses[0]);
    scene.tailnet.stop();
    reaches(&client.container, web.addresses[0]);
    // A container that was a node before starts with what it knew.
    scene.hosts[0].detach(&client.container).unwrap();
    let client = client.container.started_again();
    let started = Instant::now();
    scene.hosts[0].attach(&client).unwrap();
    assert!(started.elapsed() < START);
    assert_eq!(client.resolve(magic_dns(), "web").unwrap(), web.addresses);
    scene.tailnet.restart(&scene.underlay);
    eventually("both are online again", Duration::from_secs(45), || {
        online(&scene.tailnet, "web") && online(&scene.tailnet, "client")
    });
    reaches(&client, web.addresses[0]);
}

/// A start that must fail: in time, with a message that holds these words, and leaving nothing.
fn fails(host: &Host, options: Value, words: &[&str]) {
    let container = Container::new("web");
    let started = Instant::now();
    let message = host.attach_to(&container, "tailnet", options).unwrap_err();
    let took = started.elapsed();
    assert!(took < START, "{took:?}");
    for word in ["container web", "network tailnet"].iter().chain(words) {
        assert!(message.contains(word), "no {word:?} in: {message}");
    }
    assert!(container.namespace.links().is_empty());
    assert_eq!(host.namespace.links(), ["eth0"]);
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn without_the_daemon_a_start_fails_and_a_stop_does_not() {
    let mut scene = Scene::new(1);
    let web = Attached::new(&scene.hosts[0], "web");
    scene.hosts[0].kill();
    // The daemon's death takes the device, and that is all it takes.
    assert!(web.container.namespace.links().is_empty());
    fails(
        &scene.hosts[0],
        json!({}),
        &["tailnoded", "systemctl start tailnoded"],
    );
    scene.hosts[0].detach(&web.container).unwrap();
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn with_a_daemon_that_hangs_a_start_fails_in_time_and_a_stop_ends() {
    let mut scene = Scene::new(1);
    scene.hosts[0].freeze();
    fails(&scene.hosts[0], json!({}), &["tailnoded"]);
    let started = Instant::now();
    scene.hosts[0].detach(&Container::new("web")).unwrap();
    assert!(started.elapsed() < START);
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn without_the_coordination_server_a_first_start_fails() {
    let scene = Scene::new(1);
    let key = scene.tailnet.key(&[]);
    // Nobody listens; somebody listens and never answers; the address leads nowhere.
    let listener = scene.underlay.silent_listener(9999).unwrap();
    for url in [
        "http://10.9.0.1:9998",
        "http://10.9.0.1:9999",
        "http://10.254.0.1:8080",
    ] {
        let host = Host::start_at(&scene.underlay, url, &key);
        fails(&host, json!({}), &[url]);
        assert_eq!(host.status(), Vec::<Value>::new());
    }
    drop(listener);
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_start_that_cannot_succeed_says_why() {
    let scene = Scene::new(1);
    let host = &scene.hosts[0];
    fails(host, json!({ "hostnme": "web" }), &["hostnme", "hostname"]);
    fails(
        host,
        json!({ "auth-key": "tskey-auth-secret" }),
        &["auth-key", "file:"],
    );
    fails(
        host,
        json!({ "auth-key": "file:/nowhere/key" }),
        &["/nowhere/key"],
    );
    let wrong = host.auth_key("wrong.key", "tskey-auth-wrong");
    fails(host, json!({ "auth-key": wrong }), &["key"]);
    let once = host.auth_key("once.key", &scene.tailnet.key(&[]));
    let first = Container::new("first");
    host.attach_to(&first, "tailnet", json!({ "auth-key": once }))
        .unwrap();
    fails(host, json!({ "auth-key": once }), &["key"]);
    assert_eq!(host.status().len(), 1);
    assert!(
        !host.log().contains("tskey-auth-wrong"),
        "the key is in the log"
    );
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_network_is_checked_when_it_is_created() {
    let scene = Scene::new(1);
    let create = |options: Value| {
        scene.hosts[0].create_network(json!({
            "name": "tailnet", "id": "f00d", "driver": "tailscale", "dns_enabled": true,
            "options": options,
        }))
    };
    let network = create(json!({ "tags": "tag:web" })).unwrap();
    assert_eq!(network["dns_enabled"], false);
    assert_eq!(network["ipam_options"], json!({ "driver": "none" }));
    let message = create(json!({ "taggs": "tag:web" })).unwrap_err();
    assert!(
        message.contains("taggs") && message.contains("tags"),
        "{message}"
    );
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_container_s_own_networks_are_left_alone() {
    let scene = Scene::new(1);
    let web = Container::new("web");
    scene.hosts[0].namespace.link(
        "podman1",
        "10.88.0.1/16",
        &web.namespace,
        "eth0",
        "10.88.0.2/16",
    );
    web.namespace.ip("route add default via 10.88.0.1");
    scene.hosts[0].attach(&web).unwrap();
    let device = |words: &str| web.namespace.ip_json(words)[0]["dev"].clone();
    assert_eq!(device("route get 203.0.113.1"), "eth0");
    assert_eq!(device("route get 10.88.0.1"), "eth0");
    assert_eq!(device("route get 100.64.0.99"), "tailscale0");
    web.ping("10.88.0.1".parse().unwrap()).unwrap();
    scene.hosts[0].detach(&web).unwrap();
    assert_eq!(web.namespace.links(), ["eth0"]);
}
