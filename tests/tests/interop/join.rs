use serde_json::json;
use std::thread;
use std::time::Duration;
use tailnode_tests::Host;

use crate::scene::*;

pub const CASES: &[Case] = &[
    ("join.reusable", ALL, reusable),
    ("join.once", WITH_KEYS, once),
    ("join.expired", WITH_KEYS, expired),
    ("join.ephemeral", WITH_KEYS, ephemeral),
    ("join.tagged", WITH_KEYS, tagged),
    ("join.login", WITH_KEYS, login),
];

fn reusable(server: Server) {
    let scene = Scene::new(server);
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

fn once(server: Server) {
    let scene = Scene::new(server);
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

fn ephemeral(server: Server) {
    let scene = Scene::new(server);
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

fn expired(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key_for_a_second();
    thread::sleep(Duration::from_millis(1500));
    let ours = Ours::join(scene.host(), &scene.url(), &key, "web").err();
    assert!(ours.is_some_and(|error| error.contains("key")));
    let theirs = Gopher::join(scene.host(), &scene.url(), &key, "gopher").err();
    assert!(theirs.is_some());
}

fn tagged(server: Server) {
    let scene = Scene::new(server);
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

fn login(server: Server) {
    let scene = Scene::new(server);
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
