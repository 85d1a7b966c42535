//! Who a container is to its tailnet: the same after whatever happens to it, its daemon or its host.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test reports by panicking, and not only in its own body"
)]

use std::{fs, os::unix::fs::PermissionsExt, path::Path, thread, time::Duration};

use serde_json::{Value, json};
use tailnode_tests::{Container, Host, Tailnet, Underlay, eventually};

const PATIENCE: Duration = Duration::from_secs(30);

struct Scene {
    hosts: Vec<Host>,
    tailnet: Tailnet,
    _underlay: Underlay,
}

impl Scene {
    fn new(hosts: usize) -> Scene {
        let underlay = Underlay::new();
        let tailnet = Tailnet::start(&underlay, 8080, "demo.internal");
        let key = tailnet.key(&["--reusable"]);
        let hosts = (0..hosts)
            .map(|_| Host::start(&underlay, &tailnet, &key))
            .collect();
        Scene {
            hosts,
            tailnet,
            _underlay: underlay,
        }
    }
}

/// A container of this name starts and wants the hostname `web`. Returns its hostname, and its
/// addresses.
fn start(host: &Host, container: &Container) -> (String, Value) {
    host.attach_to(container, "tailnet", json!({ "hostname": "web" }))
        .unwrap();
    let node = host.status_of(container).unwrap()["node"].clone();
    let hostname = node["hostname"].as_str().unwrap().to_owned();
    (hostname, node["addresses"].clone())
}

fn login(host: &Host, container: &Container) -> Value {
    let status = host.status();
    let status = status.iter().find(|it| it["container"] == *container.name);
    status.map_or(Value::Null, |status| status["node"]["login"].clone())
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn two_containers_of_one_hostname_keep_their_names_in_whatever_order_they_start() {
    let mut scene = Scene::new(1);
    let (mut a, mut b) = (Container::new("a"), Container::new("b"));
    let first = start(&scene.hosts[0], &a);
    let second = start(&scene.hosts[0], &b);
    assert_eq!((&*first.0, &*second.0), ("web", "web-1"));
    assert_ne!(first.1, second.1);
    for daemon_ends in [false, true] {
        let host = &mut scene.hosts[0];
        for container in [&a, &b] {
            host.detach(container).unwrap();
        }
        if daemon_ends {
            host.kill();
            host.restart();
        }
        (a, b) = (a.started_again(), b.started_again());
        assert_eq!(start(host, &b), second);
        assert_eq!(start(host, &a), first);
    }
    // While the first is away, the second does not become it.
    scene.hosts[0].detach(&a).unwrap();
    scene.hosts[0].detach(&b).unwrap();
    assert_eq!(start(&scene.hosts[0], &b.started_again()), second);
    assert_eq!(scene.tailnet.nodes().len(), 2);
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_container_that_is_created_again_is_the_same_node() {
    let mut scene = Scene::new(1);
    let mut old = Container::new("web");
    let before = start(&scene.hosts[0], &old);
    let is_same = |host: &Host, new: &Container| assert_eq!(start(host, new), before);
    for _ in 0..3 {
        let host = &scene.hosts[0];
        // The engine takes its time with the teardown, and starts the next meanwhile.
        let new = Container::new("web");
        thread::scope(|scope| {
            scope.spawn(|| host.detach(&old).unwrap());
            is_same(host, &new);
        });
        // It does so only when the next is starting.
        old = new;
        let new = Container::new("web");
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(300));
                host.detach(&old).unwrap()
            });
            is_same(host, &new);
        });
        // It does not do so at all: the container died.
        drop(new);
        let new = Container::new("web");
        is_same(host, &new);
        // The host was reset.
        scene.hosts[0].kill();
        scene.hosts[0].restart();
        drop(new);
        old = Container::new("web");
        is_same(&scene.hosts[0], &old);
    }
    assert_eq!(scene.tailnet.nodes().len(), 1);
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_node_moves_to_another_host_with_its_name_and_addresses() {
    let scene = Scene::new(2);
    let [here, there] = &scene.hosts[..] else {
        panic!("two hosts")
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("web.node");
    let file = path.to_str().unwrap();
    let container = Container::new("front");
    let before = start(here, &container);
    let running = here.tailnode(&["state", "export", "web", file]);
    let running = running.unwrap_err();
    assert!(running.contains("`podman stop front`"), "{running}");
    assert!(!path.exists());
    here.detach(&container).unwrap();

    // By the container's name, as well as by the node's.
    here.tailnode(&["state", "export", "front", file]).unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = here.tailnode(&["state", "export", "web", file]);
    assert!(again.unwrap_err().contains("exists"), "it is not replaced");
    there.tailnode(&["state", "import", file]).unwrap();
    let twice = there.tailnode(&["state", "import", file]).unwrap_err();
    assert!(twice.contains("tailnode forget web"), "{twice}");
    here.tailnode(&["forget", "web", "--local"]).unwrap();
    assert!(!here.state_of("web").exists());

    let moved = Container::new("front");
    assert_eq!(start(there, &moved), before);
    let client = Container::new("client");
    here.attach(&client).unwrap();
    let address = before.1[0].as_str().unwrap().parse().unwrap();
    eventually("the node is reached where it is now", PATIENCE, || {
        client.ping(address).is_ok()
    });
    assert_eq!(scene.tailnet.nodes().len(), 2);
    // Nothing of its keys is told.
    let keys: Value =
        serde_json::from_slice(&fs::read(there.state_of("web").join("keys.json")).unwrap())
            .unwrap();
    for host in &scene.hosts {
        for key in ["machine", "node", "disco"] {
            let key = keys[key].as_str().unwrap().rsplit(':').next().unwrap();
            assert!(!host.log().contains(key));
        }
    }
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_node_is_forgotten_by_its_tailnet_and_its_host() {
    let mut scene = Scene::new(1);
    let web = Container::new("web");
    let before = start(&scene.hosts[0], &web);
    let forget = |host: &Host| host.tailnode(&["forget", "web", "--network", "tailnet"]);
    let running = forget(&scene.hosts[0]).unwrap_err();
    assert!(running.contains("`podman stop web`"), "{running}");
    let listed = || scene.tailnet.node("web").unwrap();
    assert_eq!(listed()["expired"], false);
    scene.hosts[0].detach(&web).unwrap();
    forget(&scene.hosts[0]).unwrap();
    assert_eq!(listed()["expired"], true);
    assert!(!scene.hosts[0].state_of("web").exists());
    let twice = forget(&scene.hosts[0]).unwrap_err();
    assert!(twice.contains("no node called web"), "{twice}");

    let web = web.started_again();
    let after = start(&scene.hosts[0], &web);
    assert_ne!(after.1, before.1);
    scene.hosts[0].detach(&web).unwrap();
    scene.tailnet.stop();
    let unheard = forget(&scene.hosts[0]).unwrap_err();
    assert!(unheard.contains("delete it there"), "{unheard}");
    assert!(!scene.hosts[0].state_of("web").exists());
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_node_whose_keys_are_damaged_asks_for_a_login() {
    let mut scene = Scene::new(1);
    let mut web = Container::new("web");
    start(&scene.hosts[0], &web);
    scene.hosts[0].detach(&web).unwrap();
    let state = scene.hosts[0].state_of("web");
    fs::write(state.join("keys.json"), "{\"version\":2,\"machi").unwrap();

    // It has an auth key, and does not use it behind anybody's back, however often it starts.
    for daemon_ends in [false, true] {
        if daemon_ends {
            scene.hosts[0].kill();
            scene.hosts[0].restart();
        }
        web = web.started_again();
        // Whether a container starts that waits for a login is an option.
        let _started = scene.hosts[0].attach(&web);
        let login = login(&scene.hosts[0], &web);
        assert_eq!(login["state"], "needs-login", "{login}");
        let reason = login["reason"].as_str().unwrap();
        let aside = reason
            .split_whitespace()
            .find(|word| word.contains(".damaged-"));
        let aside = Path::new(aside.unwrap().trim_end_matches(':'));
        assert_eq!(aside.parent(), Some(&*state));
        let kept = fs::read_to_string(aside).unwrap();
        assert_eq!(kept, "{\"version\":2,\"machi");
        assert_eq!(scene.tailnet.nodes().len(), 1);
        scene.hosts[0].detach(&web).unwrap();
    }
    web = web.started_again();
    let host = &scene.hosts[0];
    let started = host.attach(&web);
    scene
        .tailnet
        .approve(login(host, &web)["url"].as_str().unwrap());
    if started.is_err() {
        web = web.started_again();
        host.attach(&web).unwrap();
    }
    eventually("it has joined", PATIENCE, || {
        login(host, &web)["state"] == "running"
    });
    assert_eq!(scene.tailnet.nodes().len(), 2);
    // From now on it is a node like any other.
    host.detach(&web).unwrap();
    host.attach(&web.started_again()).unwrap();
    assert_eq!(scene.tailnet.nodes().len(), 2);
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_node_whose_keys_are_lost_joins_by_its_auth_key_once_it_is_forgotten() {
    let scene = Scene::new(1);
    let host = &scene.hosts[0];
    let web = Container::new("web");
    start(host, &web);
    host.detach(&web).unwrap();
    fs::write(host.state_of("web").join("keys.json"), "").unwrap();
    let damaged = host.tailnode(&["forget", "web"]).unwrap_err();
    assert!(damaged.contains("is damaged"), "{damaged}");
    host.tailnode(&["forget", "web", "--local"]).unwrap();
    start(host, &web.started_again());
    assert_eq!(scene.tailnet.nodes().len(), 2);
}
