//! The plugin as runtimes of the Container Network Interface run it, with packets.

#![allow(
    clippy::unwrap_used,
    reason = "a test reports by panicking, and not only in its own body"
)]

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use serde_json::{Value, json};
use tailnode_tests::{Container, Host, Namespace, Tailnet, Underlay, eventually};

const PATIENCE: Duration = Duration::from_secs(30);

/// The codes of this plugin: attached already, not as ADD left it.
const ATTACHED: u64 = 101;
const MISSING: u64 = 102;

/// A host with a container that Podman started, for the others to reach.
struct Scene {
    host: Host,
    peer: Container,
    peer_address: IpAddr,
    tailnet: Tailnet,
    _underlay: Underlay,
}

impl Scene {
    fn new() -> Scene {
        let underlay = Underlay::new();
        let tailnet = Tailnet::start(&underlay, 8080, "demo.internal");
        let key = tailnet.key(&["--reusable"]);
        let host = Host::start(&underlay, &tailnet, &key);
        let peer = Container::new("peer");
        host.attach(&peer).unwrap();
        let status = host.status_of(&peer).unwrap();
        let peer_address = status["node"]["addresses"][0].as_str().unwrap();
        Scene {
            peer_address: peer_address.parse().unwrap(),
            host,
            peer,
            tailnet,
            _underlay: underlay,
        }
    }

    fn run(
        &self,
        command: &str,
        pod: &Container,
        ifname: &str,
        config: &Value,
    ) -> Result<Value, Value> {
        let netns = pod.path();
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={}",
            pod.name
        );
        let environment = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", &pod.id),
            ("CNI_NETNS", netns.to_str().unwrap()),
            ("CNI_IFNAME", ifname),
            ("CNI_ARGS", &arguments),
            ("CNI_PATH", "/nowhere"),
        ];
        self.host.cni(&environment, config)
    }

    /// A command about no container.
    fn ask(&self, command: &str, config: &Value) -> Result<Value, Value> {
        let environment = [("CNI_COMMAND", command), ("CNI_PATH", "/nowhere")];
        self.host.cni(&environment, config)
    }

    /// Whether the pod and the peer reach each other.
    fn reaches(&self, pod: &Container, address: IpAddr) {
        pod.ping(self.peer_address).unwrap();
        self.peer.ping(address).unwrap();
    }
}

/// The configuration of a network, with further fields.
fn config(network: &str, fields: Value) -> Value {
    let mut config = json!({ "cniVersion": "1.1.0", "name": network, "type": "tailscale" });
    for (key, value) in fields.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn with(config: &Value, result: &Value) -> Value {
    let mut config = config.clone();
    config["prevResult"] = result.clone();
    config
}

/// The address of this number in a result.
fn address(result: &Value, number: usize) -> IpAddr {
    let text = result["ips"][number]["address"].as_str().unwrap();
    text.parse::<IpNet>().unwrap().addr()
}

fn code(answer: Result<Value, Value>) -> u64 {
    let error = answer.unwrap_err();
    assert!(error["msg"].is_string(), "{error}");
    assert_eq!(error["cniVersion"], "1.1.0");
    error["code"].as_u64().unwrap()
}

fn without_a_node(pod: &Container, host: &Host) {
    eventually("the device is gone", PATIENCE, || {
        !pod.links().iter().any(|it| it == "tailscale0")
    });
    assert_eq!(host.status_of(pod), None);
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn alone_it_makes_the_interface_that_the_runtime_names() {
    let mut scene = Scene::new();
    let network = config("pods", json!({ "options": { "ephemeral": true } }));
    assert_eq!(scene.ask("STATUS", &network), Ok(Value::Null));
    let versions = scene
        .ask("VERSION", &json!({ "cniVersion": "1.0.0" }))
        .unwrap();
    assert_eq!(versions["cniVersion"], "1.0.0");

    let pod = Container::new("web");
    let result = scene.run("ADD", &pod, "eth0", &network).unwrap();
    let netns = pod.path();
    assert_eq!(
        result["interfaces"],
        json!([{ "name": "eth0", "sandbox": netns, "mtu": 1280 }])
    );
    assert_eq!(result["dns"]["nameservers"], json!(["100.100.100.100"]));
    assert_eq!(pod.links(), ["eth0"]);
    let status = scene.host.status_of(&pod).unwrap();
    assert_eq!(status["engine"], "cni");
    assert_eq!(status["container"], "web.shop");
    assert_eq!(status["node"]["hostname"], "web-shop");
    scene.reaches(&pod, address(&result, 0));
    scene.reaches(&pod, address(&result, 0));

    let before = with(&network, &result);
    scene.run("CHECK", &pod, "eth0", &before).unwrap();
    // A second ADD changes nothing.
    assert_eq!(code(scene.run("ADD", &pod, "eth0", &network)), ATTACHED);
    scene.run("CHECK", &pod, "eth0", &before).unwrap();
    scene.reaches(&pod, address(&result, 0));

    for change in [
        format!("address del {}/32 dev eth0", address(&result, 0)),
        "link set eth0 down".to_owned(),
        "-6 route flush proto 84".to_owned(),
    ] {
        scene.run("DEL", &pod, "eth0", &network).unwrap();
        let result = scene.run("ADD", &pod, "eth0", &network).unwrap();
        let before = with(&network, &result);
        scene.run("CHECK", &pod, "eth0", &before).unwrap();
        let own = format!("address del {}/32 dev eth0", address(&result, 0));
        pod.ip(if change.starts_with("address") {
            &own
        } else {
            &change
        });
        assert_eq!(
            code(scene.run("CHECK", &pod, "eth0", &before)),
            MISSING,
            "{change}"
        );
    }

    for _ in 0..2 {
        scene.run("DEL", &pod, "eth0", &before).unwrap();
        assert!(pod.links().is_empty());
    }
    assert_eq!(code(scene.run("CHECK", &pod, "eth0", &before)), MISSING);
    eventually("the ephemeral node has left", PATIENCE, || {
        scene.tailnet.nodes().len() == 1
    });

    // The name is somebody else's.
    let lan = Namespace::new();
    pod.link("eth0", "10.1.0.2/16", &lan, "lan", "10.1.0.1/16");
    assert!(code(scene.run("ADD", &pod, "eth0", &network)) >= 100);
    assert_eq!(pod.links(), ["eth0"]);
    assert_eq!(scene.host.status_of(&pod), None);
    pod.ip("link del eth0");

    let result = scene.run("ADD", &pod, "eth0", &network).unwrap();
    let before = with(&network, &result);
    let bare = [
        ("CNI_COMMAND", "DEL"),
        ("CNI_CONTAINERID", &pod.id),
        ("CNI_IFNAME", "eth0"),
    ];
    scene.host.cni(&bare, &network).unwrap();
    assert!(pod.links().is_empty());

    scene.host.stop();
    assert_eq!(code(scene.ask("STATUS", &network)), 50);
    assert_eq!(code(scene.run("ADD", &pod, "eth0", &network)), 11);
    assert!(pod.links().is_empty());
    assert_eq!(code(scene.run("CHECK", &pod, "eth0", &before)), MISSING);
    scene.run("DEL", &pod, "eth0", &network).unwrap();
    let nobody = config("pods", json!({ "cni.dev/valid-attachments": [] }));
    scene.ask("GC", &nobody).unwrap();
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn behind_a_bridge_the_container_keeps_its_first_address() {
    let scene = Scene::new();
    let pod = Container::new("web");
    let lan = Namespace::new();
    pod.link("eth0", "10.1.0.2/16", &lan, "lan", "10.1.0.1/16");
    pod.ip("route add default via 10.1.0.1");
    let netns = pod.path();
    let bridged = json!({
        "cniVersion": "1.1.0",
        "interfaces": [{ "name": "lan" }, { "name": "eth0", "sandbox": netns }],
        "ips": [{ "address": "10.1.0.2/16", "gateway": "10.1.0.1", "interface": 1 }],
        "routes": [{ "dst": "0.0.0.0/0", "gw": "10.1.0.1" }],
        "dns": { "nameservers": ["10.1.0.1"] },
    });
    let annotations = json!({ "tailscale.hostname": "front", "example.com/other": "x" });
    let network = config(
        "chain",
        json!({ "runtimeConfig": { "io.kubernetes.cri.pod-annotations": annotations } }),
    );
    let result = scene
        .run("ADD", &pod, "eth0", &with(&network, &bridged))
        .unwrap();
    assert_eq!(result["ips"], bridged["ips"]);
    assert_eq!(result["routes"], bridged["routes"]);
    assert_eq!(
        result["interfaces"][2],
        json!({ "name": "tailscale0", "sandbox": netns, "mtu": 1280 })
    );
    assert_eq!(
        result["dns"]["nameservers"],
        json!(["100.100.100.100", "10.1.0.1"])
    );
    let status = scene.host.status_of(&pod).unwrap();
    assert_eq!(status["node"]["hostname"], "front");
    let own = status["node"]["addresses"][0].as_str().unwrap();
    let own: IpAddr = own.parse().unwrap();
    scene.reaches(&pod, own);
    pod.ping("10.1.0.1".parse().unwrap()).unwrap();
    scene
        .run("CHECK", &pod, "eth0", &with(&network, &result))
        .unwrap();
    let twice = scene.run("ADD", &pod, "eth0", &with(&network, &bridged));
    assert_eq!(code(twice), ATTACHED);

    // A second tailnet, by an interface of its own.
    let second = config("second", json!({}));
    let other = scene.run("ADD", &pod, "net1", &second).unwrap();
    assert_eq!(other["interfaces"][0]["name"], "net1");
    scene
        .run("CHECK", &pod, "net1", &with(&second, &other))
        .unwrap();
    scene
        .run("CHECK", &pod, "eth0", &with(&network, &result))
        .unwrap();
    // Of two nodes on one tailnet, the first has the way to its peers, and both are reached by them.
    scene.reaches(&pod, own);
    let second_address = address(&other, 0);
    assert_ne!(second_address, own);
    scene.peer.ping(second_address).unwrap();
    scene
        .run("DEL", &pod, "net1", &with(&second, &other))
        .unwrap();

    scene
        .run("CHECK", &pod, "eth0", &with(&network, &result))
        .unwrap();
    scene.reaches(&pod, own);
    for _ in 0..2 {
        scene
            .run("DEL", &pod, "eth0", &with(&network, &result))
            .unwrap();
        without_a_node(&pod, &scene.host);
    }
    pod.ping("10.1.0.1".parse().unwrap()).unwrap();
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn what_nobody_owns_is_collected_and_nothing_else() {
    let scene = Scene::new();
    let pods = config("pods", json!({}));
    let (kept, lost, elsewhere) = (
        Container::new("kept"),
        Container::new("lost"),
        Container::new("elsewhere"),
    );
    let result = scene.run("ADD", &kept, "eth0", &pods).unwrap();
    scene.run("ADD", &lost, "eth0", &pods).unwrap();
    scene
        .run("ADD", &elsewhere, "eth0", &config("others", json!({})))
        .unwrap();
    let owned = |ifname: &str| {
        let owned = json!([{ "containerID": kept.id, "ifname": ifname }]);
        config("pods", json!({ "cni.dev/valid-attachments": owned }))
    };
    for _ in 0..2 {
        scene.ask("GC", &owned("eth0")).unwrap();
        assert!(lost.links().is_empty());
        assert_eq!(scene.host.status_of(&lost), None);
        assert!(scene.host.status_of(&elsewhere).is_some());
        scene
            .run("CHECK", &kept, "eth0", &with(&pods, &result))
            .unwrap();
        scene.reaches(&kept, address(&result, 0));
    }
    // Podman's are not CNI's.
    let podmans = config("tailnet", json!({ "cni.dev/valid-attachments": [] }));
    scene.ask("GC", &podmans).unwrap();
    assert!(scene.host.status_of(&scene.peer).is_some());
    // The same container by another interface is another attachment.
    scene.ask("GC", &owned("net1")).unwrap();
    assert!(kept.links().is_empty());
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn what_cannot_be_done_is_told_by_its_code_and_leaves_nothing() {
    let scene = Scene::new();
    let pod = Container::new("web");
    let refused = |fields: Value, expected: u64| {
        let answer = scene.run("ADD", &pod, "eth0", &config("pods", fields));
        assert_eq!(code(answer), expected);
        assert!(pod.links().is_empty());
        assert_eq!(scene.host.status_of(&pod), None);
    };
    refused(json!({ "options": { "ephemerl": true } }), 2);
    refused(json!({ "options": { "ephemeral": "maybe" } }), 7);
    let annotations = json!({ "tailscale.login-server": "http://192.0.2.1" });
    let annotations = json!({ "io.kubernetes.cri.pod-annotations": annotations });
    refused(json!({ "runtimeConfig": annotations }), 100);

    let add = |netns: &str| {
        let environment = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", &*pod.id),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", "eth0"),
        ];
        scene.host.cni(&environment, &config("pods", json!({})))
    };
    assert_eq!(code(add("/nowhere/netns")), 3);
    assert_eq!(code(add(scene.host.namespace.path().to_str().unwrap())), 4);
    assert_eq!(code(scene.ask("ADD", &config("pods", json!({})))), 4);
    assert_eq!(code(scene.ask("PLAY", &json!({}))), 4);
}
