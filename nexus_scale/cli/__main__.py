from nexus_scale.cli import main

main()
