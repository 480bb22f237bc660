from foldbus.cli import main

main()
